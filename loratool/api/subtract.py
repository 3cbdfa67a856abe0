"""`subtract` and `swap`: adapters out of merged weights, and others in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loratool.api.merge import merge
from loratool.api.merge_job import MergeJob, Operation
from loratool.api.undo import restore_job
from loratool.errors import UsageError
from loratool.ops.subtract import (
    compare_with_record,
    require_reversible,
    require_swappable,
    without_replacements,
)
from loratool.report import SubtractReport, SwapReport
from loratool.store.provenance import read_record
from loratool.store.undo import read_undo


def subtract(
    adapters: Sequence[str],
    *,
    merged: str | Path,
    output: str | Path,
    undo: str | Path | None = None,
    **options: Any,
) -> SubtractReport:
    """Take adapters out of merged weights: W = round(W' - Σ weight·ΔW).

    Rounding cannot be undone by arithmetic: a few per cent of the elements end one step off the
    base.  With the undo file of the merge every bit comes back, which is checked.

    Args:
        adapters: paths or Hub references, with the weights at which they were merged.
        merged: the merged checkpoint.
        output: folder (or file) to create.
        undo: the file that ``merge(save_undo=…)`` wrote.
        options: as `merge`, less those about the base's form.

    Raises:
        LoratoolError: see ``docs/errors.md``.
    """
    if undo is not None and any(options.get(o) for o in ("exact", "seed", "shard_size")):
        raise UsageError("LT-251", "--undo is exact by itself and keeps the shards")
    opened = None if undo is None else read_undo(Path(undo))

    def replan(job: MergeJob) -> MergeJob:
        return _with_record(job) if opened is None else restore_job(job, opened)

    check = require_reversible if opened is None else without_replacements
    signs = (-1,) * len(adapters)
    operation = Operation("subtract", signs, SubtractReport, check, replan)
    report = merge(adapters, base=merged, output=output, operation=operation, **options)
    assert isinstance(report, SubtractReport)
    return report


def swap(
    old: str, new: str, *, merged: str | Path, output: str | Path, **options: Any
) -> SwapReport:
    """Take one adapter out of merged weights and put another in, in one sum and one rounding.

    Args:
        old: adapter that is in the weights, with the weight at which it was merged.
        new: adapter to put in its place.
        merged: the merged checkpoint.
        output: folder (or file) to create.
        options: as `merge`, less those about the base's form.

    Raises:
        LoratoolError: see ``docs/errors.md``.
    """
    operation = Operation("swap", (-1, 1), SwapReport, require_swappable, _with_record)
    report = merge([old, new], base=merged, output=output, operation=operation, **options)
    assert isinstance(report, SwapReport)
    return report


def _with_record(job: MergeJob) -> MergeJob:
    """Compare what is taken out with the merged weights' provenance."""
    out = [(a.adapter, -a.weight) for a, sign in zip(job.adapters, job.operation.signs, strict=True)
           if sign < 0]  # fmt: skip
    warnings, notes = compare_with_record(read_record(job.base.checkpoint), out)
    return replace(job, sidecar_notes=(*job.sidecar_notes, *notes), warnings=tuple(warnings))
