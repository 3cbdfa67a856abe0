"""``loratool verify``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

import loratool as lt
from loratool.cli import options as opt
from loratool.cli.progress import show_progress
from loratool.cli.render import format_seconds, line, plural, safe, some, table
from loratool.cli.voice import Voice, note_lines
from loratool.options.merging import Verify

if TYPE_CHECKING:
    from loratool.report.merge import VerifyReport

_SHOWN = 10
EXIT_DIFFERS = 10


@click.command(
    cls=opt.Command,
    name="verify",
    short_help="Recompute a merge and compare, bit by bit.",
    examples=(
        "loratool verify ./merged  # by its own record; inputs are found by name and checked",
        "loratool verify ./merged --base ./model --adapter ./style",
        "loratool verify ./merged --base ./model --adapter ./style:0.8 --adapter ./sql:0.5",
    ),
)
@click.argument("merged", metavar="MERGED")
@opt.taking(Verify)
@opt.general
def command(merged: str, base: str | None, adapters: tuple[str, ...], **options: Any) -> int:
    """Recompute the merge of ADAPTERs into BASE and compare it with MERGED.

    Every tensor is compared. Exit code 0: identical, or equal up to rounding; 10: something else.
    Works on merges made by any program. A merge made by loratool says itself what went into it:
    the inputs are looked for beside it, and their content is checked.
    """
    voice = Voice.take(options)
    source = "its base" if base is None else safe(base)
    count = plural(len(adapters), "adapter") if adapters else "what it says was merged"
    voice.announce(f"Verifying {safe(merged)} = {source} + {count}")
    with show_progress(quiet=voice.quiet) as watchers:
        report = lt.verify(merged, base=base, adapters=adapters, **watchers, **options)
    voice.show(report, render(report, voice), result=[report.verdict])
    return 0 if report.ok else EXIT_DIFFERS


def render(report: VerifyReport, voice: Voice) -> Iterator[str]:
    """The report, line by line."""
    yield from note_lines(report.notes, voice)
    yield verdict_line(report)
    if report.differing:
        yield from _differences(report, voice)
    if report.missing:
        yield line("missing", f"{len(report.missing):,}: {some(report.missing)}", tone="bad")
    if report.unexpected:
        extra = f"{len(report.unexpected):,} that no merge would write: {some(report.unexpected)}"
        yield line("extra", extra, tone="bad")


def verdict_line(report: VerifyReport) -> str:
    """``same    all 104 tensors identical, bit for bit · 0.8 s``."""
    took = format_seconds(report.seconds)
    tensors = plural(report.tensors, "tensor")
    if report.verdict == "identical":
        return line("same", f"all {tensors} identical, bit for bit", took, tone="good")
    if report.verdict == "rounding":
        counts = f"{report.identical:,} identical, {report.within_rounding:,} up to rounding"
        return line("same", f"{tensors}: {counts}", took, tone="good")
    wrong = len(report.differing) + len(report.missing) + len(report.unexpected)
    counts = f"{wrong:,} wrong, {report.identical:,} identical"
    if report.within_rounding:
        counts += f", {report.within_rounding:,} up to rounding"
    return line("DIFFERS", f"{tensors} compared: {counts}", took, tone="bad")


def _differences(report: VerifyReport, voice: Voice) -> Iterator[str]:
    shown = report.differing if voice.verbose else report.differing[:_SHOWN]
    rows = [
        (
            safe(d.name), f"{d.elements:,}", f"{d.max_ulp:.3g}" if d.max_ulp else "-",
            f"{d.residual:.2g}" if d.residual else "-", safe(d.reason),
        )
        for d in shown
    ]  # fmt: skip
    yield from table(rows, ("tensor", "elements", "max ulp", "residual", "why"), right=(1, 2, 3))
    rest = len(report.differing) - len(shown)
    if rest:
        yield f"and {rest:,} more (-v lists all)"
