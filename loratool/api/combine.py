"""`merge` of adapters with each other, and `subtract`, one less the others."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.adapter import Adapter, AdapterFiles, ReadOptions
from loratool.api.common import Limits, content_label, option_values, parse_dtype
from loratool.api.detach import Detached, detach
from loratool.api.fitting import check_files, fit_for
from loratool.api.sums import Summed, assemble_sum, run_sum
from loratool.dialects import open_adapter, write_adapter_files
from loratool.dialects.programs import Program, find_program, judge_loads
from loratool.dialects.rules import is_folder
from loratool.errors import MismatchError, UsageError, list_some
from loratool.methods import Method, find_method, parse_params
from loratool.ops.adapter_summary import dtype_word
from loratool.ops.batch import output_place
from loratool.ops.combine import arc_weights, memory_needs, plan_combine, rank_of
from loratool.ops.consent import agree_to_read
from loratool.ops.detach import plan_detach
from loratool.ops.fitting import check_fit, check_rank
from loratool.ops.input_notes import unused_warnings
from loratool.ops.inputs import (
    Access,
    OpenedAdapter,
    OpenedBase,
    guard_output,
    open_adapters,
    open_base,
)
from loratool.ops.rank_options import MAX_RANK
from loratool.ops.sums import SumPlan, compared_ranges
from loratool.ops.weights import Weight, read_module_weights, rules_json, unused_rules
from loratool.report import CombineReport, DifferenceReport, Loads, SumModuleReport, share_of
from loratool.store.provenance import adapter_id, provenance_of
from loratool.store.writer import check_output

if TYPE_CHECKING:
    from loratool.engine.run import Progress


def combine(
    adapters: Sequence[str | Path],
    *,
    output: str | Path,
    method: str | None = None,
    rank: int | None = None,
    params: Mapping[str, Any] | None = None,
    module_weights: str | Path | None = None,
    weights: Sequence[float] | None = None,
    mean: bool = False,
    base: str | Path | None = None,
    dtype: str = "auto",
    program: str | None = None,
    threads: int | None = None,
    max_memory: str | int | None = None,
    read: ReadOptions | None = None,
    access: Access | None = None,
    force: bool = False,
    dry_run: bool = False,
    provenance: bool = True,
    progress: Progress | None = None,
    minus: bool = False,
) -> CombineReport:
    """Make several adapters one.

    Args:
        adapters: as typed, each with an optional weight.
        output: folder to create.
        method: a row of `loratool.methods`; None = ``cat``, or ``svd`` if there is a rank.
        rank: of the result.
        params: of the method.
        module_weights: file of weights per module.
        weights: coefficients in order, instead of those in the names; with ``minus`` that of the
            first adapter, which is 1, may be left out.
        mean: divide by the number of adapters.
        base: for what depends on it: replaced tensors, DoRA, PiSSA and their kin.
        dtype: ``auto`` = the inputs' own, the widest if they are mixed.
        program: ``peft``, ``vllm`` or ``llama.cpp``: written as that program loads it, with one
            rank and one α/r; None = as it is.
        threads: workers; None = twice the cores, at most 8.
        max_memory: limit for the planned peak.
        read: what the files do not say.
        access: network rules.
        force: replace an earlier output.
        dry_run: plan only.
        provenance: record inputs and options.
        progress: called with (modules done, modules in all).
        minus: the first adapter less the others.

    Raises:
        LoratoolError: see ``docs/errors.md``.
    """
    started = time.monotonic()
    row = find_method(method or ("svd" if rank is not None else "cat"))
    if row.name == "cat" and rank is not None:
        row = find_method("svd")
    values = parse_params(row, params or {})
    _check_rank(rank)
    reader = None if program is None else find_program(program)
    access = access or Access()
    rules = read_module_weights(Path(module_weights), len(adapters)) if module_weights else ()
    if minus and weights is not None and len(weights) == len(adapters) - 1:
        weights = (1.0, *weights)
    opened = open_adapters(
        adapters, weights=weights, mean=mean, read=read or ReadOptions(), access=access,
        rules=rules,
    )  # fmt: skip
    if minus:
        opened = _less_the_others(opened)
    if row.name == "slerp":
        arc = arc_weights([o.weight for o in opened])
        opened = [replace(o, weight=w) for o, w in zip(opened, arc, strict=True)]
    target = output_place(output, opened[0].adapter.dialect)
    guard_output(target, [*(o.resolved.named for o in opened), module_weights, base])
    limits = Limits(threads, max_memory)
    agree_to_read(compared_ranges([o.adapter for o in opened]), yes=access.yes)
    detached = None
    if base is not None:
        found = open_base(str(base), [o.adapter for o in opened], access)
        detached = _detach(opened, found, row, limits)
    weighed = detached.adapters if detached else [(o.adapter, o.weight) for o in opened]
    if row.name == "svd" and rank is None:
        rank = max((s.rank for a, _ in weighed for s in a.specs), default=1)
    plan = plan_combine(weighed, row, verb="subtracted" if minus else "merged",
                        base=detached.plan.replaced if detached else None)  # fmt: skip
    if detached is not None:
        plan = replace(plan, dtype=detached.plan.dtype, notes=(*plan.notes, *detached.plan.notes()))
    plan = replace(plan, notes=(*plan.notes, *unused_rules([o.adapter for o in opened], rules)))
    if wanted := parse_dtype(dtype):
        plan = replace(plan, dtype=wanted)
    if reader is not None:
        plan = replace(plan, is_even=True)
        _check_program(reader, plan, row, rank, [o.adapter for o in opened])
    needs, kept = memory_needs(plan, row, rank)
    memory = limits.plan(
        needs, kept=kept,
        hint="--method cat, svd or core" if row.space in ("dense", "joint") else "",
    )  # fmt: skip
    labels = tuple({"label": o.resolved.label, **o.weight.to_json()} for o in opened)
    kind = DifferenceReport if minus else CombineReport
    job = _Job(kind, row, values, rank, plan, labels, target, memory.peak_bytes, started)
    job.warnings += [f"{o.resolved.label}: {w}" for o in opened for w in unused_warnings(o.adapter)]
    if dry_run:
        return job.report(None, 0, ())
    check_output(target, is_folder=is_folder(opened[0].adapter.dialect), force=force)
    is_copy = row.name == "cat" and not (wanted or detached)
    if is_copy and [w for _, w in weighed] == [Weight()]:
        adapter, summed = opened[0].adapter, None
    else:
        summed = run_sum(
            plan, rank, method=row, params=values, threads=memory.threads,
            executor=limits.executor, progress=progress,
        )  # fmt: skip
        adapter = assemble_sum(plan, summed, opened[0].adapter)
        if detached is not None:
            adapter = detached.attach(adapter, limits)
    fitted = fit_for(adapter, reader, limits)
    record: dict[str, Any] = {}
    if provenance:
        options = option_values(
            method=row.name, params=dict(values), rank=rank, dtype=dtype,
            module_weights=rules_json(rules), **{"for": program},
        )  # fmt: skip
        name = "subtract" if minus else "merge adapters"
        inputs = _inputs(opened)
        if detached is not None:
            inputs |= detached.record(inputs)
        record = provenance_of(name, options=options, inputs=inputs)
    files = write_adapter_files(fitted.adapter)
    check_files(files, adapter, reader)
    size = _write(files, target, record, opened, force)
    report = job.report(summed, size, judge_loads(open_adapter(target)))
    if summed is None:
        report = replace(report, dry_run=False, relative_error=fitted.relative_error)
    return replace(report, notes=(*report.notes, *fitted.notes),
                   warnings=(*report.warnings, *fitted.warnings))  # fmt: skip


def _detach(
    opened: Sequence[OpenedAdapter], base: OpenedBase, method: Method, limits: Limits
) -> Detached | None:
    """What depends on the base, taken apart; None if nothing does.

    Raises:
        MismatchError: LT-418, a method that is no sum has no say in rows of the base.
    """
    plan = plan_detach([(o.adapter, o.weight) for o in opened], base.checkpoint)
    if plan.turned and method.name not in ("cat", "svd"):
        raise MismatchError(
            "LT-418", f"{method.name} works on changes that do not depend on the base",
            key=list_some(sorted(plan.turned), 3), got="DoRA", hint="--method cat or --method svd",
        )  # fmt: skip
    return None if plan.is_idle else detach(plan, base, limits)


def _check_program(
    program: Program, plan: SumPlan, method: Method, rank: int | None, adapters: Sequence[Adapter]
) -> None:
    """Refuse, before any work, what the program would not load."""
    for adapter in adapters:
        check_fit(adapter, program)
    ranks = [rank_of(m, method, rank) for m in plan.modules if not m.is_bias]
    check_rank(max(ranks, default=0), program, adapters[0])


def _less_the_others(opened: Sequence[OpenedAdapter]) -> list[OpenedAdapter]:
    """The first as it is, the others with their signs turned.

    Raises:
        UsageError: LT-297, the first has a weight.
    """
    first, *others = opened
    if first.weight.value != 1 or first.weight.components:
        raise UsageError(
            "LT-297", "subtract takes the first adapter as it is", key=first.resolved.label,
            got=f"weight {first.weight}", hint="loratool rescale multiplies an adapter",
        )  # fmt: skip
    return [first, *(replace(o, weight=o.weight.times(-1)) for o in others)]


def _check_rank(rank: int | None) -> None:
    if rank is None:
        return
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise UsageError("LT-228", "--rank is a whole number", got=rank, hint="--rank 8")
    if not 1 <= rank <= MAX_RANK:
        raise UsageError("LT-229", "--rank out of range", expected=f"1 to {MAX_RANK}", got=rank)


def _inputs(opened: Sequence[OpenedAdapter]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for one in opened:
        label = content_label(one.resolved, found)
        found[label] = {**one.weight.to_json(), "files": adapter_id(one.adapter)}
    return found


def _write(
    files: AdapterFiles,
    target: Path,
    record: dict[str, Any],
    opened: Sequence[OpenedAdapter],
    force: bool,
) -> int:
    from loratool.store.adapter_writer import write_adapter

    extras = next((o.adapter.extras for o in opened if o.adapter.extras), {})
    return write_adapter(files, target, record=record, force=force, extras=extras)


class _Job:
    """What the report says whatever happens."""

    def __init__(
        self,
        kind: type[CombineReport],
        method: Method,
        params: Mapping[str, Any],
        rank: int | None,
        plan: SumPlan,
        labels: tuple[dict[str, Any], ...],
        target: Path,
        peak: int,
        started: float,
    ) -> None:
        self.kind, self.method, self.params, self.rank, self.plan = kind, method, params, rank, plan
        self.labels, self.target, self.peak, self.started = labels, target, peak, started
        self.warnings: list[str] = []

    def report(self, summed: Summed | None, size: int, loads: Sequence[Loads]) -> CombineReport:
        """From the results, or from the plan alone."""
        plan = self.plan
        by_name = {m.spec.name: m for m in summed.modules} if summed else {}
        modules = []
        for module in plan.modules:
            done = by_name.get(module.spec.name)
            planned = module.rank
            if not module.is_bias and self.method.name not in ("cat", "slerp"):
                planned = min(module.rank, rank_of(module, self.method, self.rank))
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
        dtype = summed.dtype if summed else plan.dtype
        warnings = list(self.warnings)
        if dtype != plan.dtype:
            warnings.append("float16 cannot hold the largest factor: written as float32")
        if summed and square == 0 and plan.modules:
            equal = ": the adapters are equal" if self.kind is DifferenceReport else ""
            warnings.append(f"the result is zero{equal}")
        mixed = tuple(mix.name for mix in plan.mixed)
        return self.kind(
            output=str(self.target),
            adapters=self.labels,
            method=self.method.name,
            params=dict(self.params),
            rank=self.rank,
            modules=tuple(modules),
            norm=math.sqrt(square),
            relative_error=share_of(error, square),
            dtype=dtype_word(dtype),
            kept=(*(r.name for r in plan.replacements), *mixed),
            peak_memory_bytes=self.peak,
            output_bytes=size,
            seconds=time.monotonic() - self.started,
            loads_in=tuple(loads),
            warnings=tuple(warnings),
            notes=plan.notes,
            dry_run=summed is None,
        )
