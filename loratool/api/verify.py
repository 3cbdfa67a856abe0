"""`verify`: recompute a merge and compare."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.adapter import ReadOptions
from loratool.api.common import file_rules, plan_resources, rounding_args
from loratool.api.merge_job import MergeJob, NameOptions, prepare_merge
from loratool.errors import UsageError
from loratool.ops.bind import BindOptions
from loratool.ops.combine import combination_args
from loratool.ops.inputs import Access, locate
from loratool.ops.replay import RecordedOptions, find_replay, merge_record, refuse_record
from loratool.ops.verify import VerifyPlan, plan_verify, under_names_of
from loratool.ops.weights import read_module_weights, rules_from
from loratool.report import TensorDifference, VerifyReport
from loratool.store.checkpoint import open_checkpoint
from loratool.store.source import AdapterArgument

if TYPE_CHECKING:
    from loratool.engine.run import Progress


def verify(
    merged: str | Path,
    *,
    base: str | Path | None = None,
    adapters: Sequence[str | Path] = (),
    weights: Sequence[float] | None = None,
    mean: bool = False,
    module_weights: str | Path | None = None,
    device: str = "auto",
    threads: int | None = None,
    max_memory: str | int | None = None,
    untie: bool = False,
    keep_tied: bool = False,
    rename: Sequence[str] = (),
    skip: Sequence[str] = (),
    allow_unmatched: bool = False,
    resize_embeddings: bool = False,
    offline: bool = False,
    yes: bool = False,
    alpha: float | None = None,
    rank_from: str | None = None,
    mha_out_proj: str | None = None,
    moe_layout: str | None = None,
    experts_b_order: str | None = None,
    allow_nonfinite: bool = False,
    max_header: str | int | None = None,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> VerifyReport:
    """Recompute W + Σ weight·ΔW and compare it with a merged checkpoint, tensor by tensor.

    The verdict is ``identical`` (every bit), ``rounding`` (no element further away than another
    order of the same arithmetic explains, see ``docs/exactness.md``) or ``differs``.  How sums
    were rounded is taken from the checkpoint's provenance; so is whatever is not given.

    Args:
        merged: the checkpoint under test.
        base: what it was merged from, or ``auto``; None = by its provenance, looked for beside
            it and in the working folder.
        adapters: what was merged, with weights; empty = by its provenance, as is all that
            follows down to ``experts_b_order``.
        weights: see `merge`, as all further arguments.
        mean: divide by the number of adapters.
        module_weights: as given to the merge; None = by the provenance.
        device: ``auto``, ``cpu`` or ``cuda[:n]``.
        threads: workers.
        max_memory: limit for the planned peak.
        untie: as given to the merge.
        keep_tied: as given to the merge.
        rename: as given to the merge.
        skip: as given to the merge.
        allow_unmatched: as given to the merge.
        resize_embeddings: as given to the merge.
        offline: never touch the network.
        yes: agree to large downloads.
        alpha: lora_alpha for files without a configuration.
        rank_from: ``file`` or ``config`` where they contradict.
        mha_out_proj: as given to the merge.
        moe_layout: as given to the merge.
        experts_b_order: as given to the merge.
        allow_nonfinite: as given to the merge.
        max_header: as given to the merge.
        allow_pickle: as given to the merge.
        progress: called with (bytes done, bytes in all).
    """
    started = time.monotonic()
    names = NameOptions(
        BindOptions(
            tuple(rename), tuple(skip), allow_unmatched, untie, keep_tied,
            resize_embeddings, moe_layout,
        ),
        ReadOptions(alpha, rank_from, mha_out_proj, moe_layout, experts_b_order),
    )  # fmt: skip
    access = Access(offline, yes, file_rules(max_header, allow_pickle))
    resolved = locate(str(merged), kind="base", access=access)
    found = open_checkpoint(resolved.path, max_header=access.rules.max_header)
    record = merge_record(found)
    options: RecordedOptions = {} if record is None else record.options
    refuse = partial(refuse_record, found)
    inputs: Sequence[str | Path | AdapterArgument] = adapters
    if not adapters or base is None:
        roots = (resolved.path.absolute().parent, Path.cwd())
        given = None if base is None else str(base)
        replay = find_replay(
            record, found, base=given, roots=tuple(dict.fromkeys(roots)),
            look=lambda place, kind: locate(str(place), kind=kind, access=access),
        )  # fmt: skip
        base = replay.base
        if not adapters:
            inputs, weights, mean = replay.adapters, None, False
            names = _recorded_names(options)
    names = replace(names, codes=options.get("codes", ""))
    if module_weights is not None:
        rules = read_module_weights(Path(module_weights), len(inputs))
    else:  # of other adapters than those given they say nothing
        recorded = rules_from(options.get("module_weights", ()), refuse)
        rules = tuple(r for r in recorded if len(r[1]) == len(inputs))
    try:
        job = prepare_merge(
            inputs,
            base=base,
            weights=weights,
            mean=mean,
            names=names,
            access=access,
            dtype=None,
            shard_bytes=None,
            output=None,
            with_provenance=False,
            rounding=_rounding(options),
            module_weights=rules,
            like=found,
        )
    except UsageError as error:
        if error.code in _OF_RECORDS and (not adapters or error.code in _OF_ROUNDING):
            refuse(error.message())
        raise
    found = under_names_of(found, job.checkpoint)
    plan = plan_verify(job.merge.plan, job.full_names, found)
    resources = plan_resources(
        plan.plan,
        device=device,
        threads=threads,
        max_memory=max_memory,
        chunk_bytes=None,
        sample=False,
        progress=progress,
        allow_nonfinite=allow_nonfinite,
    )
    from loratool.engine.run import execute
    from loratool.store.reader import FileReader

    with FileReader() as reader:
        results = execute(plan.plan, reader, None, resources.run)
        reader.check_unchanged()
    return _report(job, resolved.label, plan, results, started)


_OF_ROUNDING = ("LT-217", "LT-218", "LT-255", "LT-256", "LT-257", "LT-286")
_OF_RECORDS = ("LT-240", "LT-241", "LT-242", "LT-243", "LT-244", "LT-281", *_OF_ROUNDING)
"""Usage errors that a record can make: it is damaged then."""


def _rounding(options: RecordedOptions) -> dict[str, Any]:
    """How sums were formed."""
    how, seed = options.get("rounding", "nearest"), options.get("seed")
    is_exact = how == "exact"
    return {
        **rounding_args(is_exact, "nearest" if is_exact else how, seed),
        **combination_args(options.get("method"), options.get("params"), rank=None, exact=is_exact),
    }


def _recorded_names(options: RecordedOptions) -> NameOptions:
    """Options of names and reading, as `loratool.api.merge_job` recorded them."""

    def part(kind: type[BindOptions] | type[ReadOptions]) -> dict[str, Any]:
        known = {f.name for f in fields(kind)}
        return {k: v for k, v in options.items() if k in known}

    return NameOptions(BindOptions(**part(BindOptions)), ReadOptions(**part(ReadOptions)))


def _report(
    job: MergeJob, label: str, plan: VerifyPlan, results: Sequence[Any], started: float
) -> VerifyReport:
    differing = [
        TensorDifference(name=name, elements=0, max_ulp=0.0, residual=0.0, reason=reason)
        for name, reason in plan.unlike
    ]
    identical = within = 0
    for result in results:
        if result.differing == 0:
            identical += 1
        elif result.outside == 0:
            within += 1
        else:
            differing.append(_difference(result))
    failed = differing or plan.missing or plan.unexpected
    verdict = "differs" if failed else "rounding" if within else "identical"
    return VerifyReport(
        merged=label,
        base=job.base.resolved.label,
        verdict=verdict,
        tensors=len(results),
        identical=identical,
        within_rounding=within,
        differing=tuple(differing),
        missing=plan.missing,
        unexpected=plan.unexpected,
        seconds=time.monotonic() - started,
        notes=tuple(job.merge.notes),
    )


def _difference(result: Any) -> TensorDifference:
    if not result.delta_square:
        reason = "changed, but no adapter touches it"
        return TensorDifference(result.name, result.outside, result.max_ulp, 0.0, reason)
    residual = math.sqrt(result.residual_square / result.delta_square)
    reason = "the change is missing" if abs(residual - 1) < 0.01 else "another change"
    return TensorDifference(result.name, result.outside, result.max_ulp, residual, reason)
