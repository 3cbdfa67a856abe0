"""What ``loratool merge`` and ``subtract`` say when there is no base: adapters alone."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from loratool.cli.loads import loads_lines
from loratool.cli.render import (
    advice,
    format_bytes,
    format_lost,
    format_number,
    format_seconds,
    format_shape,
    line,
    plural,
    safe,
    table,
)
from loratool.cli.voice import Voice, note_lines, warning_lines
from loratool.methods import BY_NAME

if TYPE_CHECKING:
    from loratool.report.combine import CombineReport


def headline(
    count: int, terms: str, method: str | None, rank: int | None, *, has_base: bool = False
) -> str:
    """``Merging 2 adapters WITH EACH OTHER, no base: 0.8·a + 1·b, cat: exact, ranks add``."""
    name = method or ("svd" if rank is not None else "cat")
    row = BY_NAME.get(name)
    how = f"{name}: {row.title}" if row else safe(name)
    base = "the base for what depends on it" if has_base else "no base"
    return f"Merging {plural(count, 'adapter')} WITH EACH OTHER, {base}: {terms}; {how}"


def plan_lines(report: CombineReport, voice: Voice) -> Iterator[str]:
    """What is known before the work."""
    yield from note_lines(report.notes, voice)
    if report.params:
        yield line("method", report.method, *(f"{k}={_value(v)}" for k, v in report.params.items()))
    yield line("modules", *_shared(report), _ranks(report))
    yield line("", f"memory ≤ {format_bytes(report.peak_memory_bytes)}")


def render(
    report: CombineReport, voice: Voice, planned: CombineReport | None = None
) -> Iterator[str]:
    """The report, line by line, less what of the plan was printed before the work."""
    if planned is None:
        yield from plan_lines(report, voice)
    else:
        yield from note_lines((n for n in report.notes if n not in planned.notes), voice)
        if _ranks(report) != _ranks(planned):  # found to be less than they could be
            yield line("modules", _ranks(report))
    if voice.verbose:
        rows = [
            (safe(m.name), format_shape(m.shape), str(m.rank), f"{m.norm:.3g}",
             f"{m.relative_error:.1e}")
            for m in report.modules
        ]  # fmt: skip
        yield from table(rows, ("module", "shape", "rank", "‖ΔW‖", "rel. error"), right=(2, 3, 4))
    if not report.dry_run:
        lost = format_lost(report.relative_error)
        lost = lost if lost == "nothing" else f"{lost} of ΔW"
        what = "storage" if BY_NAME[report.method].cuts_nothing else "the rank and storage"
        size = "" if math.isnan(report.norm) else f"‖ΔW‖ {report.norm:.4g}"
        yield line("loss", f"{what} ({report.dtype}) lost {lost}", size)
    yield from warning_lines(report.warnings)
    if report.dry_run:
        yield voice.dry_run()
        return
    yield line("wrote", f"{safe(report.output)} · {format_bytes(report.output_bytes)} "
               f"{report.dtype}", format_seconds(report.seconds), tone="good")  # fmt: skip
    yield from loads_lines(report.loads_in, voice)
    from loratool.ops.summary import base_to_type

    base = base_to_type(report.base_model)
    into = shlex.join(["loratool", "merge", report.output, "--base", base, "-o", "MERGED"])
    yield from advice("next", into, report.output)


def _ranks(report: CombineReport) -> str:
    ranks = sorted({m.rank for m in report.modules if len(m.shape) > 1})
    if len(ranks) > 1:
        return f"ranks {ranks[0]}-{ranks[-1]}"
    return f"rank {ranks[0]}" if ranks else ""


def _shared(report: CombineReport) -> list[str]:
    """How many modules the adapters have in common."""
    count = len(report.adapters)
    if report.command == "subtract" or count == 2:
        alone = [sum(m.sources == (i,) for m in report.modules) for i in range(count)]
        labels = [safe(a["label"], cap=40) for a in report.adapters]
        return [
            f"{sum(len(m.sources) > 1 for m in report.modules)} shared",
            *(f"{n} only in {label}" for n, label in zip(alone, labels, strict=True) if n),
        ]
    shared = sum(len(m.sources) == count for m in report.modules)
    where = [f"{shared} in all of them"] if count > 1 else []
    return [plural(len(report.modules), "module"), *where]


def _value(value: Any) -> str:
    return format_number(value) if isinstance(value, float) else safe(str(value))
