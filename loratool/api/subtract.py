"""`subtract` and `swap`: adapters out of merged weights or of each other, and others in."""

from __future__ import annotations

from loratool.api.access import access_of
from loratool.api.anchored import anchor, with_notes
from loratool.api.combine import run_combine
from loratool.api.merge import run_merge
from loratool.api.merge_job import MergeJob, Operation
from loratool.api.told_apart import by_weights
from loratool.api.undo import restore_job
from loratool.errors import MismatchError, UsageError
from loratool.frozen import replace
from loratool.ops.access import open_patches
from loratool.ops.replay import merge_record
from loratool.ops.subtract import (
    compare_with_record,
    require_reversible,
    require_swappable,
    require_unscaled,
    without_overwritten,
    without_replacements,
)
from loratool.ops.undo import read_undo
from loratool.options.calls import takes
from loratool.options.merging import Combine, Merge, Subtract, Swap
from loratool.options.words import asked_of, options_of
from loratool.report.combine import DifferenceReport
from loratool.report.merge import SubtractReport, SwapReport


@by_weights
@takes(Subtract)
def subtract(asked: Subtract) -> SubtractReport | DifferenceReport:
    """Take adapters out of merged weights, W = round(W' - Σ weight·ΔW), or out of an adapter.

    Without ``merged`` the result is an adapter, the first one less the others: factors side by
    side, exact in ΔW up to their storage type, or the best approximation of a ``rank``.

    Rounding cannot be undone by arithmetic: a few per cent of the elements end one step off the
    base.  With the undo file of the merge every bit comes back, which is checked.

    Raises:
        LoratoolError: see ``docs/errors.md``.

    Example:
        >>> lt.subtract(["style", "sql:0.5"], output="rest").norm > 0
        True
    """
    if asked.merged is None:
        return _subtract_adapters(asked)
    if asked.rank is not None or asked.dtype != "auto" or asked.program or asked.to:
        raise UsageError(
            "LT-298", "--rank, --dtype, --to and --for are for adapter − adapter, without --from"
        )  # fmt: skip
    if asked.undo is not None and (asked.base or asked.exact or asked.seed):
        raise UsageError("LT-251", "--undo is exact by itself, needs no base and keeps the shards")
    opened = None if asked.undo is None else open_patches(asked.undo, access_of(asked), read_undo)
    check = require_reversible if opened is None and asked.base is None else None
    if opened is not None:
        check = without_replacements

    def replan(job: MergeJob) -> MergeJob:
        return (
            _with_record(anchor(job, asked.base, access_of(asked), exact=asked.exact))
            if opened is None
            else restore_job(job, opened, reads=not asked.dry_run)
        )

    signs = (-1,) * len(asked.adapters)
    inputs = tuple(path for path in (asked.undo, asked.base) if path is not None)
    operation = Operation("subtract", signs, SubtractReport, check, replan, inputs)
    report = run_merge(asked.take(Merge, base=asked.merged), operation)
    assert isinstance(report, SubtractReport)
    if opened is None or opened.table.kept is None or asked.dry_run:
        return report
    return replace(report, kept=report.copied)


def _subtract_adapters(asked: Subtract) -> DifferenceReport:
    """The options that make sense without merged weights; all others must be at their default."""
    if len(asked.adapters) < 2:
        named = " ".join(map(str, asked.adapters))
        raise UsageError(
            "LT-252", "one adapter alone: subtract it from what?",
            expected="--from MERGED, or a second adapter", got=named,
            hint=f"loratool subtract {named} --from MERGED -o {asked.output}",
        )  # fmt: skip
    known = {"device", *(o.name for o in options_of(Combine))} - {"mean", "ema"}
    other = [o for o in asked_of(Subtract, vars(asked)) if o.words.section and o.name not in known]
    if other:
        raise UsageError(
            "LT-299", "these options are for merged weights",
            got=", ".join(o.flags[-1] for o in other), expected="--from MERGED",
        )  # fmt: skip
    report = run_combine(asked.take(Combine), minus=True)
    assert isinstance(report, DifferenceReport)
    return report


@takes(Swap)
def swap(asked: Swap) -> SwapReport:
    """Take one adapter out of merged weights and put another in, in one sum and one rounding.

    Raises:
        LoratoolError: see ``docs/errors.md``.

    Example:
        >>> _ = lt.merge(["style"], base="base", output="merged")
        >>> lt.swap("style", "sql", merged="merged", output="switched").changed
        14
    """

    def replan(job: MergeJob) -> MergeJob:
        return _with_record(anchor(job, asked.base, access_of(asked), exact=asked.exact))

    check = require_swappable if asked.base is None else without_overwritten
    inputs = () if asked.base is None else (asked.base,)
    operation = Operation("swap", (-1, 1), SwapReport, check, replan, inputs)
    merged = asked.take(Merge, adapters=(asked.old, asked.new), base=asked.merged)
    report = run_merge(merged, operation)
    assert isinstance(report, SwapReport)
    return report


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
    return replace(with_notes(job, notes), warnings=(*job.warnings, *warnings))
