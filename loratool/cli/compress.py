"""``loratool compress``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import loratool as lt
from loratool.cli import options as opt
from loratool.cli.loads import loads_lines
from loratool.cli.render import (
    format_bytes,
    format_number,
    format_seconds,
    format_share,
    line,
    plural,
    safe,
    some,
    table,
)
from loratool.cli.voice import (
    Voice,
    failed_lines,
    note_lines,
    unit_of,
    warning_lines,
)
from loratool.options.shaping import Compress

if TYPE_CHECKING:
    from loratool.report.compress import CompressedAdapter, CompressReport, PlannedCompression

_WORDS = {"rank": "rank", "energy": "energy", "error": "error", "sv_ratio": "σ ratio",
          "sv_sum": "sum of σ", "sv_min": "σ at least",
          "sv_base": "σ/‖W‖ at least", "max_rank": "rank at most",
          "size": "size"}  # fmt: skip


@click.command(
    cls=opt.Command,
    name="compress",
    short_help="Fewer ranks, the best ones, loss shown. No base needed.",
    examples=(
        "loratool compress ./r64 --rank 16 -o ./r16",
        "loratool compress ./r64 --energy 0.99 --max-rank 16 -o ./small",
        "loratool compress ./r64 --size 20MB -o ./small       # spent where it counts",
        "loratool compress loras/* --error 0.05 -o small/     # many, names kept",
    ),
)
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER…")
@opt.taking(Compress)
@opt.general
def command(adapters: tuple[str, ...], output: str, **options: Any) -> int:
    """Compress adapters: the best approximation of lower rank, module by module.

    Works on the factors alone: exact singular values, no base model, no ΔW in memory. A module
    that would not get smaller keeps its bytes; one that needs no rank at all is left out.
    """
    voice = Voice.take(options)
    asked = [f"{_WORDS[k]} {options[k]}" for k in _WORDS if options[k] is not None]
    what = safe(adapters[0]) if len(adapters) == 1 else plural(len(adapters), "adapter")
    voice.announce(f"Compressing {what}" + (f" to {', '.join(asked)}" if asked else ""))
    with voice.watching(plan_lines, unit_of(options)) as plan:
        report = lt.compress(adapters, output=output, **plan.options, **options)
    return voice.show_made(report, render(report, voice), (r.output for r in report.adapters))


def plan_lines(plan: PlannedCompression, _voice: Voice) -> Iterator[str]:
    """What is known before the work."""
    ranks = f"rank {_span(plan.ranks)}" if plan.ranks else ""
    yield line("plan", plural(plan.modules, "module"), ranks, format_bytes(plan.bytes_before),
               f"memory ≤ {format_bytes(plan.peak_memory_bytes)}",
               f"{safe(plan.device)}: {safe(plan.device_reason)}")  # fmt: skip


def render(report: CompressReport, voice: Voice) -> Iterator[str]:
    """The report, line by line."""
    if len(report.adapters) > 1:
        yield from _many(report.adapters)
    for one in report.adapters:
        if len(report.adapters) == 1:
            yield from _one(one, voice, report.dry_run)
        elif voice.verbose:
            yield line("", safe(one.source))
            yield from _modules(one)
    yield from warning_lines(report.warnings)
    yield from failed_lines(report.failed)
    if report.dry_run:
        yield voice.dry_run()
        return
    before = sum(one.bytes_before for one in report.adapters)
    after = sum(one.bytes_after for one in report.adapters)
    first = report.adapters[0].output
    many = f"{plural(len(report.adapters), 'adapter')} to {Path(first).parent}"
    where = first if len(report.adapters) == 1 else many
    yield line("wrote", safe(where), f"{format_bytes(after)} of {format_bytes(before)}",
               format_seconds(report.seconds), tone="good")  # fmt: skip
    if len(report.adapters) == 1 and report.adapters[0].loads_in:
        yield from loads_lines(report.adapters[0].loads_in, voice)


def _one(one: CompressedAdapter, voice: Voice, dry_run: bool) -> Iterator[str]:
    yield from note_lines(one.notes, voice)
    yield from _families(one)
    if voice.verbose:
        yield from _modules(one)
    if one.is_unchanged:
        yield line("same", "nothing would get smaller: the output is the input", tone="warn")
    if one.dropped:
        yield line("dropped", f"{plural(len(one.dropped), 'module')} of rank 0: "
                   f"{some(one.dropped, 3)}", tone="warn")  # fmt: skip
    if one.widened:
        yield line("float32", f"float16 cannot hold {some(one.widened, 3)}", tone="warn")
    if dry_run:
        yield line("size", f"{format_bytes(one.bytes_after)} of {format_bytes(one.bytes_before)}")


def _many(adapters: Sequence[CompressedAdapter]) -> list[str]:
    rows = [
        (
            safe(a.source, cap=60), str(len(a.modules)), _span([m.rank_before for m in a.modules]),
            _span([m.rank for m in a.modules]), format_share(a.captured_energy, aligned=True),
            f"{a.relative_error:.3g}", format_bytes(a.bytes_before), format_bytes(a.bytes_after),
        )
        for a in adapters
    ]  # fmt: skip
    head = ("adapter", "modules", "rank", "new rank", "energy", "rel. error", "before", "after")
    return table(rows, head, right=(1, 2, 3, 4, 5, 6, 7))


def _families(one: CompressedAdapter) -> list[str]:
    rows = [
        (
            safe(f.family), str(f.modules), format_number(f.rank_before), format_number(f.rank),
            format_share(f.captured_energy, aligned=True), f"{f.relative_error:.3g}",
        )
        for f in one.families
    ]  # fmt: skip
    rows.append((
        "total", str(len(one.modules)), _span([m.rank_before for m in one.modules]),
        _span([m.rank for m in one.modules]), format_share(one.captured_energy, aligned=True),
        f"{one.relative_error:.3g}",
    ))  # fmt: skip
    head = ("family", "modules", "rank", "new rank", "energy", "rel. error")
    return table(rows, head, right=(1, 2, 3, 4, 5))


def _modules(one: CompressedAdapter) -> list[str]:
    rows = [
        (
            safe(m.name), str(m.rank_before), str(m.rank), f"{m.norm:.3g}",
            format_share(m.captured_energy, aligned=True), f"{m.relative_error:.3g}",
            "copied" if m.is_copied else "",
        )
        for m in one.modules
    ]  # fmt: skip
    head = ("module", "rank", "new rank", "‖ΔW‖", "energy", "rel. error", "")
    return table(rows, head, right=(1, 2, 3, 4, 5))


def _span(ranks: Sequence[int]) -> str:
    low, high = min(ranks), max(ranks)
    return str(low) if low == high else f"{low}–{high}"
