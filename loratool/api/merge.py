"""`merge`: adapters into base weights."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.api.access import access_of, parse_size
from loratool.api.combine import run_combine
from loratool.api.common import (
    Resources,
    check_codes,
    parse_dtype,
    plan_resources,
    rounding_args,
    run_id,
)
from loratool.api.least_time import least_time
from loratool.api.merge_job import MergeJob, MergeRequest, Operation, prepare_merge
from loratool.api.merge_report import merge_report, plain_result
from loratool.api.open_residual import block_elements, check_partner, open_residual
from loratool.api.page import check_page, with_page
from loratool.api.session import run_plan
from loratool.api.told_apart import by_base
from loratool.api.undo import UndoJob, plan_undo, write_undo
from loratool.engine.rows import op_of
from loratool.errors import UsageError
from loratool.frozen import Frozen, replace
from loratool.ops.combine import check_into, combination_args, combine_options
from loratool.ops.consent import agree_to_read
from loratool.ops.inputs import guard_output
from loratool.ops.shards import index_files
from loratool.ops.weights import read_module_weights
from loratool.options.calls import takes
from loratool.options.groups import Codes, Mix, Names, Run
from loratool.options.merging import Combine, Merge
from loratool.options.words import asked_of
from loratool.report.combine import CombineReport
from loratool.report.merge import MergeReport
from loratool.store.header import uncollected
from loratool.store.outputs import check_output, open_output, place_of
from loratool.store.staging import Making

if TYPE_CHECKING:
    from loratool.engine.sink import CheckpointSink

_NO_BASE = "no base to merge into: the result is an adapter, as of loratool.combine"


@by_base
@takes(Merge)
def merge(asked: Merge) -> MergeReport | CombineReport:
    """Merge adapters into base weights: W' = round(W + Σ weight·ΔW), all in one pass.

    Without a base, or with ``into="adapter"``, it does what `combine` does, and says so.

    Returns:
        What changed, what rounding lost, what was skipped: a `MergeReport` with a base, else a
        `CombineReport`; type checkers are told so.

    Raises:
        LoratoolError: see ``docs/errors.md``.

    Example:
        >>> report = lt.merge(["style:0.8", "sql"], base="base", output="merged")
        >>> report.changed
        14
    """
    if check_into(asked.into, has_base=asked.base is not None) == "base":
        check_page(asked.html, asked.output, asked.save_undo)
        return with_page(run_merge(asked), asked.html)
    report = run_combine(Combine(**combine_options(vars(asked))))
    return replace(report, notes=(*report.notes, _NO_BASE))


def run_merge(asked: Merge, operation: Operation | None = None) -> MergeReport:
    """`merge` into a base, or what `subtract` and `swap` make of it.

    Args:
        asked: what goes into which base.
        operation: what the engine is used for; None = adapters are put in.
    """
    started = time.monotonic()
    with uncollected():
        job = _prepare(asked, operation or Operation())
    resources_for = partial(
        plan_resources, asked=asked.take(Run), chunk_bytes=asked.chunk_bytes,
        block_elements=job.block_elements, sample=asked.dry_run,
        allow_nonfinite=asked.allow_nonfinite, folder=Path(asked.output).absolute().parent,
    )  # fmt: skip
    resources = resources_for(job.merge.plan)
    undo = None if asked.save_undo is None else _plan_undo(asked, job, resources, resources_for)
    run_notes: list[str] = []
    if asked.on_plan is not None and not asked.dry_run:
        asked.on_plan(merge_report(job, resources, (), (), dry_run=False, started=started))
    if asked.dry_run:
        results = _predict(job, resources, asked.yes)
    else:
        before_commit = None if undo is None else partial(write_undo, job, undo.job, undo.resources)
        results, run_notes = _write(asked, job, resources, before_commit)
    with uncollected():
        report = merge_report(
            job, resources, results, run_notes, dry_run=asked.dry_run, started=started
        )
    if asked.dry_run:
        report = replace(report, least_time=least_time(job))
    if undo is None:
        return report
    size = 0 if asked.dry_run else undo.job.path.stat().st_size
    peak = max(resources.memory.peak_bytes, undo.resources.memory.peak_bytes)
    return replace(report, undo=str(undo.job.path), undo_bytes=size, peak_memory_bytes=peak)


def _prepare(asked: Merge, operation: Operation) -> MergeJob:
    """Check the options that no file has a say in, then open, bind and plan."""
    access = access_of(asked, in_place=asked.dry_run)
    assert asked.base is not None
    if asked.tokenizer not in (None, "base", "adapter"):
        raise UsageError(
            "LT-206", "unknown --tokenizer", expected="base or adapter", got=asked.tokenizer
        )
    check_codes(asked)
    how = combination_args(
        asked.method, asked.params, rank=asked.rank, exact=asked.exact,
        form="--for" if asked.program else "--to" if asked.to else "",
    )  # fmt: skip
    table = asked.module_weights
    rules = read_module_weights(Path(table), len(asked.adapters)) if table else ()
    target = place_of(asked.output)
    if not asked.dry_run:  # before a long download, not after it
        guard_output(target, (*asked.adapters, asked.base, *_others(asked, operation)))
        check_output(target, is_folder=target.suffix != ".safetensors", force=asked.force,
                     series=asked.series)  # fmt: skip
    names, rest = asked.take(Names), None
    if asked.residual is not None:
        rest, names = open_residual(
            asked.residual, asked.adapters, names, access, asked.dtype, asked.rounding
        )
    is_exact = asked.exact or rest is not None
    job = prepare_merge(MergeRequest(
        asked.adapters, asked.base, names, access,
        mix=asked.take(Mix), rules=rules, dtype=parse_dtype(asked.dtype),
        shard_bytes=parse_size(asked.shard_size), output=target,
        with_provenance=asked.provenance, checksum=asked.checksum,
        identify=not asked.dry_run or asked.save_undo is not None,
        rounding={**rounding_args(is_exact, asked.rounding, asked.seed), **how},
        operation=operation, residual=rest, tokenizer=asked.tokenizer, codes=asked.take(Codes),
    ))  # fmt: skip
    if rest is not None:
        check_partner(rest, job.adapters[0])
    return replace(job, block_elements=block_elements(rest) or job.block_elements)


def _others(asked: Merge, operation: Operation) -> tuple[str | Path | None, ...]:
    """What is read beside adapters and base."""
    return (asked.residual, asked.module_weights, *operation.inputs)


class _Undo(Frozen):
    """An undo file to be written, and what that takes."""

    job: UndoJob
    resources: Resources


def _plan_undo(
    asked: Merge, job: MergeJob, resources: Resources, resources_for: Callable[..., Resources]
) -> _Undo:
    assert asked.save_undo is not None
    path = Path(asked.save_undo)
    identity = run_id(job.merge.plan, resources.device)
    guard_output(path, _others(asked, job.operation))
    casts = [o.flags[-1] for o in asked_of(Codes, vars(asked))]
    casts += [] if asked.dtype == "auto" else ["--dtype"]
    undo = plan_undo(job, path, identity, casts=casts, force=asked.force)
    return _Undo(undo, resources_for(undo.plan))


def _predict(job: MergeJob, resources: Resources, yes: bool) -> list[Any]:
    """What a sample of the blocks says that the whole would."""
    from loratool.engine.reads import planned_ranges
    from loratool.engine.run import execute
    from loratool.store.reader import FileReader

    plan = job.merge.plan
    agree_to_read(planned_ranges(plan, elements=resources.run.elements, sample=True), yes=yes)
    with FileReader() as reader:
        return execute(plan, reader, None, resources.run)


def _write(
    asked: Merge, job: MergeJob, resources: Resources,
    before_commit: Callable[[CheckpointSink], None] | None,
) -> tuple[list[Any], list[str]]:  # fmt: skip
    """Write the output; returns the steps' results and notes about an interrupted run."""
    from loratool.engine.sink import CheckpointSink
    from loratool.ops.loss import require_kept
    from loratool.store.jsonfile import dump_json
    from loratool.store.marker import MARKER
    from loratool.store.stamps import take_stamps

    assert job.output is not None
    plan = job.merge.plan
    is_folder = job.base.checkpoint.is_folder
    stamps = take_stamps(plan.refs())
    indices = index_files(plan, job.checkpoint) if is_folder else {}
    names = [*(s.name for s in plan.shards), *(s.name for s in job.sidecars), *indices]
    output = open_output(
        job.output,
        Making(
            is_folder=is_folder, plan_id=run_id(plan, resources.device),
            names=[*names, MARKER] if is_folder else names, force=asked.force,
            restart=asked.restart, inputs=stamps, series=asked.series,
            need_bytes=plan.output_bytes + sum(s.nbytes for s in job.sidecars),
        ),
    )  # fmt: skip
    with output:
        sink = CheckpointSink(plan, output)
        results = run_plan(plan, resources, sink, stamps=stamps)
        if any(op_of(s).writes_codes for s in plan.steps) and not asked.force:
            changed = [r for r in map(plain_result, results) if r.get("delta_square", 0) > 0]
            require_kept(changed, {s.output.name: s.output.numel for s in plan.steps})
        if before_commit is not None:  # so that no output ever lacks its undo file
            before_commit(sink)
        if is_folder:
            for sidecar in job.sidecars:
                sidecar.write_to(output)
            for name, index in indices.items():
                output.write_file(name, dump_json(index))
        record = {**job.record, "device": resources.device.partition(":")[0]}
        output.commit(record if job.record else {})
    return results, output.notes
