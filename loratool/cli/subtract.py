"""``loratool subtract``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from loratool.cli import merge as merging
from loratool.cli import options as opt
from loratool.cli.progress import show_progress
from loratool.cli.render import line, plural, safe
from loratool.cli.voice import Voice, warning_lines
from loratool.errors import UsageError

if TYPE_CHECKING:
    from loratool.report import SubtractReport


@click.command(
    cls=opt.Command,
    name="subtract",
    short_help="Take adapters out of merged weights.",
    examples=(
        "loratool subtract ./style --from ./merged -o ./model",
        "loratool subtract ./style:0.8 --from ./merged --undo undo.safetensors -o ./model",
    ),
)
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER[:W]…")
@opt.option("--from", "merged", metavar="MERGED", section="Input",
            help="Weights that the adapters were merged into.")  # fmt: skip
@opt.option("--undo", metavar="FILE", section="Input",
            help="Undo file of the merge: restores every bit, and checks it.")  # fmt: skip
@opt.mixing
@opt.option("-o", "--output", required=True, metavar="OUT", section="Output",
            help="Folder to create (a .safetensors file if MERGED is one).")  # fmt: skip
@opt.rounding
@opt.writing
@opt.names
@opt.resources
@opt.network
@opt.general
@opt.reading
@opt.checkpoint_writing
@opt.trust
@opt.nonfinite
def command(adapters: tuple[str, ...], merged: str | None, output: str, **options: Any) -> None:
    """Take ADAPTERs out of MERGED: W = W' - Σ weight·ΔW, rounded once.

    Give the weights at which they were merged. Arithmetic cannot see through the rounding of the
    merge: a few per cent of the elements end one step off the base. The undo file of
    `merge --save-undo` brings every bit back.
    """
    from loratool import api

    voice = Voice.take(options)
    if merged is None:
        raise UsageError(
            "LT-252", "subtract takes adapters out of merged weights: --from is missing",
            expected="--from MERGED", got=" ".join(adapters),
            hint=f"loratool subtract {' '.join(adapters)} --from MERGED -o {output}",
        )  # fmt: skip
    terms = merging.terms(adapters, options["weights"], options["mean"])
    how = "every bit by the undo file" if options["undo"] else "one rounding"
    voice.announce(
        f"Taking {plural(len(adapters), 'adapter')} OUT OF merged weights: {terms}, {how}"
    )
    with show_progress(quiet=voice.quiet) as progress:
        report = api.subtract(adapters, merged=merged, output=output, progress=progress, **options)
    result = [] if report.dry_run else [safe(report.output)]
    voice.show(report, render(report, voice), result=[*warning_lines(report.warnings), *result])


def render(report: SubtractReport, voice: Voice) -> Iterator[str]:
    """The report, line by line."""
    yield from merging.render(report, voice)
    if report.restored:
        words = f"{plural(report.restored, 'tensor')} equal to the base in every bit, checked"
        yield line("same", words, f"{report.corrected:,} elements set right", tone="good")
