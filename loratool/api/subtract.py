"""`subtract` and `swap`: adapters out of merged weights or of each other, and others in."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loratool.adapter import ReadOptions
from loratool.api.combine import combine
from loratool.api.common import content_label, file_rules
from loratool.api.merge import merge
from loratool.api.merge_job import MergeJob, Operation
from loratool.api.undo import restore_job
from loratool.errors import MismatchError, UsageError
from loratool.ops.inputs import Access, open_base
from loratool.ops.replay import merge_record
from loratool.ops.subtract import (
    anchored,
    compare_with_record,
    depends_on_base,
    require_reversible,
    require_swappable,
    require_unscaled,
    without_overwritten,
    without_replacements,
)
from loratool.ops.undo import read_undo
from loratool.report import DifferenceReport, SubtractReport, SwapReport
from loratool.store.provenance import checkpoint_id


def subtract(
    adapters: Sequence[str | Path],
    *,
    merged: str | Path | None = None,
    output: str | Path,
    undo: str | Path | None = None,
    base: str | Path | None = None,
    rank: int | None = None,
    **options: Any,
) -> SubtractReport | DifferenceReport:
    """Take adapters out of merged weights, W = round(W' - Σ weight·ΔW), or out of an adapter.

    Without ``merged`` the result is an adapter, the first one less the others: factors side by
    side, exact in ΔW up to their storage type, or the best approximation of a ``rank``.

    Rounding cannot be undone by arithmetic: a few per cent of the elements end one step off the
    base.  With the undo file of the merge every bit comes back, which is checked.

    Args:
        adapters: paths or Hub references, with the weights at which they were merged.
        merged: the merged checkpoint; None = adapters only.
        output: folder (or file) to create.
        undo: the file that ``merge(save_undo=…)`` wrote.
        base: what the adapters were trained on, for what depends on it: replaced tensors, DoRA,
            PiSSA and their kin.
        rank: of the resulting adapter; None = the sum of the ranks.
        options: as `merge`, less those about the base's form.

    Raises:
        LoratoolError: see ``docs/errors.md``.
    """
    if merged is None:
        return _subtract_adapters(adapters, output, undo, base, rank, options)
    if rank is not None or options.get("dtype", "auto") != "auto" or options.get("program"):
        raise UsageError(
            "LT-298", "--rank, --dtype and --for are for adapter − adapter, without --from"
        )  # fmt: skip
    if undo is not None and (base or any(options.get(o) for o in ("exact", "seed", "shard_size"))):
        raise UsageError("LT-251", "--undo is exact by itself, needs no base and keeps the shards")
    opened = None if undo is None else read_undo(Path(undo))
    check = require_reversible if opened is None and base is None else None
    if opened is not None:
        check = without_replacements

    def replan(job: MergeJob) -> MergeJob:
        if opened is not None:
            return restore_job(job, opened)
        return _with_record(job if base is None else _anchor(job, base, options))

    signs = (-1,) * len(adapters)
    inputs = tuple(path for path in (undo, base) if path is not None)
    operation = Operation("subtract", signs, SubtractReport, check, replan, inputs)
    report = merge(adapters, base=merged, output=output, operation=operation, **options)
    assert isinstance(report, SubtractReport)
    return report


def _subtract_adapters(
    adapters: Sequence[str | Path],
    output: str | Path,
    undo: str | Path | None,
    base: str | Path | None,
    rank: int | None,
    options: Mapping[str, Any],
) -> DifferenceReport:
    """The options that make sense without merged weights; all others must be at their default."""
    if len(adapters) < 2:
        named = " ".join(map(str, adapters))
        raise UsageError(
            "LT-252", "one adapter alone: subtract it from what?",
            expected="--from MERGED, or a second adapter", got=named,
            hint=f"loratool subtract {named} --from MERGED -o {output}",
        )  # fmt: skip
    mine = {
        "force", "dry_run", "provenance", "offline", "yes", "weights", "dtype", "alpha",
        "rank_from", "mha_out_proj", "moe_layout", "experts_b_order", "device", "threads",
        "max_memory", "progress", "chunk_bytes", "max_header", "allow_pickle", "module_weights",
        "program",
    }  # fmt: skip
    idle = (None, False, (), "auto", "nearest")
    other = [k for k, v in {**options, "undo": undo}.items() if k not in mine and v not in idle]
    if other:
        raise UsageError(
            "LT-299", "these options are for merged weights", got=", ".join(
                "--" + name.replace("_", "-") for name in other), expected="--from MERGED",
        )  # fmt: skip
    report = combine(
        adapters,
        output=output,
        base=base,
        rank=rank,
        module_weights=options.get("module_weights"),
        weights=options.get("weights"),
        dtype=options.get("dtype") or "auto",
        program=options.get("program"),
        threads=options.get("threads"),
        max_memory=options.get("max_memory"),
        read=ReadOptions(
            options.get("alpha"), options.get("rank_from"), options.get("mha_out_proj"),
            options.get("moe_layout"), options.get("experts_b_order"),
        ),
        access=Access(
            bool(options.get("offline")),
            bool(options.get("yes")),
            file_rules(options.get("max_header"), bool(options.get("allow_pickle"))),
            in_place=bool(options.get("dry_run")),
        ),
        force=bool(options.get("force")),
        dry_run=bool(options.get("dry_run")),
        provenance=bool(options.get("provenance", True)),
        progress=options.get("progress"),
        minus=True,
    )  # fmt: skip
    assert isinstance(report, DifferenceReport)
    return report


def swap(
    old: str,
    new: str,
    *,
    merged: str | Path,
    output: str | Path,
    base: str | Path | None = None,
    **options: Any,
) -> SwapReport:
    """Take one adapter out of merged weights and put another in, in one sum and one rounding.

    Args:
        old: adapter that is in the weights, with the weight at which it was merged.
        new: adapter to put in its place.
        merged: the merged checkpoint.
        output: folder (or file) to create.
        base: what the adapters were trained on, for what depends on it.
        options: as `merge`, less those about the base's form.

    Raises:
        LoratoolError: see ``docs/errors.md``.
    """

    def replan(job: MergeJob) -> MergeJob:
        return _with_record(job if base is None else _anchor(job, base, options))

    check = require_swappable if base is None else without_overwritten
    inputs = () if base is None else (base,)
    operation = Operation("swap", (-1, 1), SwapReport, check, replan, inputs)
    report = merge([old, new], base=merged, output=output, operation=operation, **options)
    assert isinstance(report, SwapReport)
    return report


def _anchor(job: MergeJob, base: str | Path, options: Mapping[str, Any]) -> MergeJob:
    """Changes that depend on the base refer to its tensors, not to the merged ones.

    Raises:
        UsageError: LT-251, with --exact.
    """
    plan = job.merge.plan
    if not any(depends_on_base(step) for step in plan.steps):
        return job
    if options.get("exact"):
        raise UsageError("LT-251", "--exact is for sums of products, --base for all others")
    rules = file_rules(options.get("max_header"), bool(options.get("allow_pickle")))
    access = Access(bool(options.get("offline")), bool(options.get("yes")), rules)
    opened = open_base(str(base), [a.adapter for a in job.adapters], access)
    label = content_label(opened.resolved, plan.inputs)
    row = {label: {"role": "original", "files": checkpoint_id(opened.checkpoint)}}
    plan = anchored(plan, job.full_names, opened.checkpoint)
    plan = replace(plan, inputs={**plan.inputs, **row})
    record = {**job.record, "inputs": {**job.record["inputs"], **row}} if job.record else {}
    if record and not job.base.checkpoint.is_folder:
        (shard,) = plan.shards
        metadata = {**shard.metadata, "loratool": json.dumps(record)}
        plan = replace(plan, shards=(replace(shard, metadata=metadata),))
    return replace(job, merge=replace(job.merge, plan=plan), record=record)


def _with_record(job: MergeJob) -> MergeJob:
    """Compare what is taken out with the merged weights' provenance."""
    try:
        record = merge_record(job.base.checkpoint)
    except MismatchError:  # taking out needs no record
        record = None
    require_unscaled(record, job.bound)
    signed = zip(job.adapters, job.operation.signs, strict=True)
    out = [(a.adapter, a.weight.times(-1)) for a, sign in signed if sign < 0]
    warnings, notes = compare_with_record(record, out)
    return replace(
        job,
        sidecar_notes=(*job.sidecar_notes, *notes),
        warnings=(*job.warnings, *warnings),
    )
