"""``loratool check``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

import loratool as lt
from loratool.cli import options as opt
from loratool.cli.render import line, plural, safe, some, table
from loratool.cli.voice import Voice, note_lines, warning_lines
from loratool.options.looking import Check

if TYPE_CHECKING:
    from loratool.report.check import CheckReport, Finding

EXIT_DIFFERS = 10
_HEADS = {
    "yes": ("loads", "good"), "unsure": ("unsure", "warn"), "wrong": ("WRONG", "bad"),
    "no": ("NO", "bad"),
}  # fmt: skip
_SHOWN = 2


@click.command(
    cls=opt.Command,
    name="check",
    short_help="Will that program load it, and right? Module by module.",
    examples=(
        "loratool check ./style --for vllm",
        "loratool check style.safetensors --for comfyui",
        "loratool check style.safetensors --for diffusers --json   # every module",
        "loratool check ./style --for vllm --fix -o ./style-vllm",
        "loratool check ./style --for llama.cpp --fix --base ./model -o style.gguf",
    ),
)
@click.argument("adapter", metavar="ADAPTER")
@opt.taking(Check)
@opt.general
def command(adapter: str, **options: Any) -> int:
    """Say what a program makes of an adapter, by the rules of its loader. Headers only.

    Every module loads, is dropped without an error, is wrong (another scale, part of it) or
    raises. Exit code 0: it loads right; 10: it does not. --fix writes the same change in a form
    that loads.
    """
    voice = Voice.take(options)
    report = lt.check(adapter, **options)
    voice.show(report, render(report, voice), result=[report.output or report.verdict])
    return 0 if report.ok else EXIT_DIFFERS


def render(report: CheckReport, voice: Voice) -> Iterator[str]:
    """The report, line by line."""
    word, tone = _HEADS[report.verdict]
    number = sum(report.counts.values())
    counts = [_counted(verdict, count) for verdict, count in report.counts.items()]
    many = plural(number, "module") if number else "no modules"
    many += f": {', '.join(counts)}" if len(counts) > 1 else ""
    family = f"{safe(report.family)} names" if report.family else ""
    yield line(
        word, f"{safe(report.source, cap=60)} in {report.program} {report.version}", family,
        many, tone=tone,
    )  # fmt: skip
    if report.findings:
        rows = [_row(report, f) for f in report.findings]
        yield from table(rows, ("verdict", "modules", "why", "such as"), right=(1,))
    for finding in () if voice.quiet else report.findings:
        yield line(
            safe(finding.rule), safe(finding.says), safe(finding.source, cap=400), tone="dim"
        )
    if report.past:
        yield line("past", *(f"{f.verdict}: {safe(f.words)}" for f in report.past), tone="dim")
    yield from note_lines((*report.fixed, *report.notes), voice)
    yield from warning_lines(report.warnings)
    if report.output:
        yield line("wrote", safe(report.output, cap=400), tone="good")
    elif report.next and not voice.quiet:
        yield line("next", safe(report.next, cap=2000), tone="dim")


def _counted(verdict: str, count: int) -> str:
    """``3 load``, ``1 raises``, ``2 wrong``."""
    word = verdict.removesuffix("s") if count != 1 and verdict in ("loads", "raises") else verdict
    return f"{count:,} {word}"


def _row(report: CheckReport, finding: Finding) -> tuple[str, str, str, str]:
    names = set(finding.names)
    hit = sum(not names or not names.isdisjoint((m.module, *m.keys)) for m in report.modules)
    return finding.verdict, f"{hit:,}", safe(finding.words), some(finding.names, _SHOWN)
