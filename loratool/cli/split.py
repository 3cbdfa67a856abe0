"""``loratool split``."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

import loratool as lt
from loratool.cli import merge as merging
from loratool.cli import options as opt
from loratool.cli.loads import loads_lines
from loratool.cli.render import advice, format_bytes, format_seconds, line, plural, safe
from loratool.cli.voice import Plan, Voice, warning_lines
from loratool.errors import list_some
from loratool.options.merging import Split

if TYPE_CHECKING:
    from loratool.report.split import SplitReport


@click.command(
    cls=opt.Command,
    name="split",
    short_help="A slim adapter for servers, and a base with what they leave out.",
    examples=(
        "loratool split ./chat --base ./model -o ./served",
        "loratool split ./chat --base auto --for vllm -o ./for-vllm",
    ),
)
@click.argument("adapter", metavar="ADAPTER")
@opt.taking(Split)
@opt.general
def command(adapter: str, output: str, **options: Any) -> None:
    """Write DIR/adapter, the low-rank part of ADAPTER alone, and DIR/base, with all else in it.

    Servers load factors, and refuse or drop what was trained besides: heads, embeddings, new
    tokens, biases, norms. Those go into a copy of BASE, and the adapter then is one for that.
    """
    voice = Voice.take(options)
    voice.announce(f"Splitting {safe(adapter)} into an adapter and its base")
    with voice.watching(plan_lines) as plan:
        report = lt.split(adapter, output=output, **plan.options, **options)
    warnings = report.merged.warnings if report.merged else ()
    made = [report.adapter, report.base]
    voice.show_made(report, render(report, voice, plan), made, warnings)


def plan_lines(report: SplitReport, voice: Voice) -> Iterator[str]:
    """What is known before the work."""
    if report.merged is not None:
        yield from merging.plan_lines(report.merged, voice)
    yield line("to base", plural(len(report.moved), "change"), safe(list_some(report.moved, 3)))
    yield line("adapter", f"{plural(report.modules, 'module')} left")


def render(report: SplitReport, voice: Voice, plan: Plan) -> Iterator[str]:
    """The report, line by line."""
    if plan.report is None:
        yield from plan_lines(report, voice)
    if report.merged is not None:
        yield from warning_lines(report.merged.warnings)
    places = f"{safe(report.adapter)} and {safe(report.base)}"
    if report.dry_run:
        yield line("dry run", f"would write {places}")
        return
    made = "" if report.merged else "the base by the interrupted run"
    yield line("wrote", f"{safe(report.adapter)} · {format_bytes(report.adapter_bytes)}",
               safe(report.base), made, format_seconds(report.seconds), tone="good")  # fmt: skip
    yield from loads_lines(report.loads_in, voice)
    words = ["loratool", "merge", report.adapter, "--base", report.base, "-o", "MERGED"]
    yield from advice("next", shlex.join(words), report.output)
