"""Adapter − Σ weight·adapter, without a base."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loratool.adapter import ReadOptions
from loratool.api.common import content_label, option_values, parse_dtype
from loratool.api.sums import Summed, assemble_sum, run_sum
from loratool.dialects import open_adapter, write_adapter_files
from loratool.errors import UsageError
from loratool.ops.adapter_summary import dtype_word
from loratool.ops.batch import output_folder
from loratool.ops.consent import agree_to_read
from loratool.ops.inputs import Access, OpenedAdapter, guard_output, open_adapters
from loratool.ops.loads import judge_loads
from loratool.ops.sums import SumPlan, compared_ranges, plan_sum
from loratool.report import DifferenceReport, Loads, SumModuleReport, share_of
from loratool.store.provenance import adapter_id, provenance_of
from loratool.store.writer import check_output


def subtract_adapters(
    adapters: Sequence[str],
    *,
    output: str | Path,
    weights: Sequence[float] | None,
    rank: int | None,
    dtype: str,
    read: ReadOptions,
    access: Access,
    force: bool,
    dry_run: bool,
    provenance: bool,
) -> DifferenceReport:
    """The first adapter less the others times their weights.

    Args:
        adapters: as typed; the first one's weight is 1.
        output: folder to create.
        weights: of the adapters after the first, in order, instead of those in the names.
        rank: truncate to the best approximation of this rank; None = exact.
        dtype: ``auto`` = the inputs' own.
        read: what the files do not say.
        access: network rules.
        force: replace an earlier output.
        dry_run: plan only.
        provenance: record inputs and options.

    Raises:
        LoratoolError: see ``docs/errors.md``.
    """
    started = time.monotonic()
    if weights is not None:
        weights = (1.0, *weights) if len(weights) == len(adapters) - 1 else weights
    opened = open_adapters(adapters, weights=weights, mean=False, read=read, access=access)
    if opened[0].weight != 1:
        raise UsageError(
            "LT-297", "subtract takes the first adapter as it is", key=adapters[0],
            hint="loratool rescale multiplies an adapter",
        )  # fmt: skip
    signed = [(o.adapter, o.weight if i == 0 else -o.weight) for i, o in enumerate(opened)]
    target = output_folder(output)
    guard_output(target, [o.resolved.path for o in opened])
    agree_to_read(compared_ranges([a for a, _ in signed]), yes=access.yes)
    plan = plan_sum(signed, verb="subtracted")
    if wanted := parse_dtype(dtype):
        plan = replace(plan, dtype=wanted)
    labels = tuple({"label": o.resolved.label, "weight": w}
                   for o, (_, w) in zip(opened, signed, strict=True))  # fmt: skip
    if dry_run:
        return _report(plan, None, labels, target, rank, 0, (), started)
    check_output(target, is_folder=True, force=force)
    summed = run_sum(plan, rank)
    adapter = assemble_sum(plan, summed, signed[0][0])
    record: dict[str, Any] = {}
    if provenance:
        record = provenance_of(
            "subtract",
            options=option_values(weights=[w for _, w in signed], rank=rank, dtype=dtype),
            inputs=_inputs(opened),
        )
    from loratool.store.adapter_writer import write_adapter

    extras = opened[0].adapter.extras
    size = write_adapter(
        write_adapter_files(adapter), target, record=record, force=force, extras=extras
    )
    return _report(
        plan, summed, labels, target, rank, size, judge_loads(open_adapter(target)), started
    )


def _inputs(opened: Sequence[OpenedAdapter]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for one in opened:
        found[content_label(one.resolved, found)] = adapter_id(one.adapter)
    return found


def _report(
    plan: SumPlan,
    summed: Summed | None,
    labels: tuple[dict[str, Any], ...],
    target: Path,
    rank: int | None,
    size: int,
    loads: Sequence[Loads],
    started: float,
) -> DifferenceReport:
    by_name = {m.spec.name: m for m in summed.modules} if summed else {}
    modules = []
    for module in plan.modules:
        done = by_name.get(module.spec.name)
        planned = module.rank if rank is None else min(rank, module.rank)
        modules.append(
            SumModuleReport(
                name=module.spec.name,
                shape=module.shape,
                rank=done.spec.rank if done else planned,
                sources=tuple(t.adapter for t in module.terms),
                norm=math.sqrt(done.square) if done else math.nan,
                relative_error=share_of(done.error_square, done.square) if done else math.nan,
            )
        )
    square = math.fsum(m.square for m in summed.modules) if summed else math.nan
    error = math.fsum(m.error_square for m in summed.modules) if summed else math.nan
    warnings = []
    dtype = summed.dtype if summed else plan.dtype
    if dtype != plan.dtype:
        warnings.append("float16 cannot hold the largest factor: written as float32")
    if summed and square == 0:
        warnings.append("the result is zero: the adapters are equal")
    return DifferenceReport(
        output=str(target),
        adapters=labels,
        rank=rank,
        modules=tuple(modules),
        norm=math.sqrt(square),
        relative_error=share_of(error, square),
        dtype=dtype_word(dtype),
        kept=tuple(r.name for r in plan.replacements),
        output_bytes=size,
        seconds=time.monotonic() - started,
        loads_in=tuple(loads),
        warnings=tuple(warnings),
        notes=plan.notes,
        dry_run=summed is None,
    )
