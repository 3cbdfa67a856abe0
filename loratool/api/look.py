"""`inspect --base`: an adapter beside the base that it would be merged into."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loratool.api.common import plan_resources
from loratool.api.merge_job import MergeRequest, prepare_merge
from loratool.api.session import run_plan
from loratool.dtypes import DTYPES
from loratool.frozen import replace
from loratool.ops.access import Access
from loratool.ops.consent import agree_to_read
from loratool.ops.inputs import OpenedBase
from loratool.options.groups import Mix, Names, Read, Run
from loratool.plan import DeltaPart, Plan
from loratool.report.families import family_of
from loratool.report.look import AdapterLook, Sums, combine

if TYPE_CHECKING:
    from loratool.engine.looking import Look


def look_at_base(
    path: Path, base: str | Path, *, read: Read, access: Access, run: Run
) -> tuple[AdapterLook, OpenedBase]:
    """Measure every delta beside the weights it changes, reading these once, in blocks.

    Returns:
        What was found, and the base: ``auto`` may have stood for any.

    Raises:
        LoratoolError: as `merge`: whatever does not bind cannot be looked at.
    """
    from loratool.engine.reads import factor_ranges

    names = read.take(Names, untie=True)  # each tensor beside its own change
    mix = Mix(weights=(1.0,))
    job = prepare_merge(MergeRequest([str(path)], base, names, access, mix, codes=None))
    plan = plan_look(job.merge.plan)
    agree_to_read(factor_ranges(job.adapters[0].adapter.specs), yes=access.yes)
    results = run_plan(plan, plan_resources(plan, run))
    found = [one for looks in results for one in looks]
    order = {spec.name: i for i, spec in enumerate(job.adapters[0].adapter.specs)}
    ranks = {s.name: s.rank for s in job.adapters[0].adapter.specs}
    found.sort(key=lambda one: order[one.name])
    return _summed(job.base.resolved.label, found, ranks), job.base


def plan_look(merge: Plan) -> Plan:
    """Look at the deltas of a merge's steps instead of adding them."""
    steps = tuple(
        replace(step, op="look_at_base", inputs=step.inputs[:1], parts=parts, shard=-1)
        for step in merge.steps
        if (parts := tuple(p for p in step.parts if isinstance(p, DeltaPart)))
    )
    return Plan("inspect", steps)


def _summed(label: str, found: Sequence[Look], ranks: dict[str, int]) -> AdapterLook:
    groups: dict[str, list[Sums]] = {}
    for one in found:
        groups.setdefault(one.name, []).append(Sums(
            family_of(one.name), DTYPES[one.dtype].word or one.dtype, ranks[one.name], one.numel,
            one.weight_square, one.delta_square, one.core_square, one.noise_rank, one.errors,
            one.changed,
        ))  # fmt: skip
    modules = []
    for name, rows in groups.items():
        made = combine(name, rows[0].family, rows)
        known = [r.noise_rank for r in rows if r.noise_rank is not None]
        tops = [one.noise_top for one in found if one.name == name and one.noise_top is not None]
        modules.append(replace(
            made, noise_rank=max(known, default=None), noise_top=max(tops, default=None)
        ))  # fmt: skip
    flat = [r for rows in groups.values() for r in rows]
    families = tuple(
        combine(f, f, [r for r in flat if r.family == f])
        for f in dict.fromkeys(r.family for r in flat)
    )
    return AdapterLook(label, tuple(modules), families, combine("total", "total", flat))
