"""``loratool swap``."""

from __future__ import annotations

from typing import Any

import click

import loratool as lt
from loratool.cli import merge as merging
from loratool.cli import options as opt
from loratool.cli.voice import Voice
from loratool.options.merging import Swap


@click.command(
    cls=opt.Command,
    name="swap",
    short_help="Exchange one merged adapter for another, in one rounding.",
    examples=("loratool swap ./style ./sql:0.8 --in ./merged -o ./switched",),
)
@click.argument("old", metavar="OLD[:W]")
@click.argument("new", metavar="NEW[:W]")
@opt.taking(Swap)
@opt.general
def command(old: str, new: str, merged: str, output: str, **options: Any) -> None:
    """Take OLD out of MERGED and put NEW in: W'' = W' - ΔW_old + ΔW_new, rounded once.

    Task switching (LoRA paper, section 4) in one pass over the weights.
    """
    voice = Voice.take(options)
    out, into = merging.terms([old]), merging.terms([new])
    voice.announce(f"Swapping IN merged weights: {out} out, {into} in, one rounding")
    with voice.watching(merging.plan_lines) as plan:
        report = lt.swap(old, new, merged=merged, output=output, **plan.options, **options)
    lines = merging.render(report, voice, planned=plan.report)
    voice.show_made(report, lines, [report.output])
