"""``loratool subtract``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

import loratool as lt
from loratool.cli import combine
from loratool.cli import merge as merging
from loratool.cli import options as opt
from loratool.cli.render import line, plural
from loratool.cli.voice import Voice
from loratool.options.groups import Mix
from loratool.options.merging import Subtract
from loratool.options.words import only_of

if TYPE_CHECKING:
    from loratool.report.merge import SubtractReport


@click.command(
    cls=opt.Command,
    name="subtract",
    short_help="Take adapters out of merged weights, or of another adapter.",
    examples=(
        "loratool subtract ./style ./base-style:0.5 -o ./rest          # adapter − 0.5·adapter",
        "loratool subtract ./style --from ./merged -o ./model",
        "loratool subtract ./style:0.8 --from ./merged --undo undo.safetensors -o ./model",
    ),
)
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER[:W]…")
@opt.taking(Subtract)
@opt.general
def command(adapters: tuple[str, ...], merged: str | None, output: str, **options: Any) -> None:
    """Take ADAPTERs out of MERGED: W = W' - Σ weight·ΔW, rounded once.

    Give the weights at which they were merged. Arithmetic cannot see through the rounding of the
    merge: a few per cent of the elements end one step off the base. The undo file of
    `merge --save-undo` brings every bit back.

    Without --from the result is an adapter: the first one less the others times their weights,
    exact in ΔW because the factors are put side by side. Replaced tensors, DoRA, PiSSA and their
    kin need the base, --base.
    """
    from loratool.report.merge import SubtractReport

    voice = Voice.take(options)
    if merged is None:
        _subtract_adapters(adapters, output, options, voice)
        return
    terms = merging.terms(adapters, Mix(**only_of(Mix, options)))
    how = "every bit by the undo file" if options["undo"] else "one rounding"
    voice.announce(
        f"Taking {plural(len(adapters), 'adapter')} OUT OF merged weights: {terms}, {how}"
    )
    with voice.watching(merging.plan_lines) as plan:
        report = lt.subtract(adapters, merged=merged, output=output, **plan.options, **options)
    assert isinstance(report, SubtractReport)
    voice.show_made(report, render(report, voice, plan.report), [report.output])


def render(
    report: SubtractReport, voice: Voice, planned: SubtractReport | None = None
) -> Iterator[str]:
    """The report, line by line, less what of the plan was printed before the work."""
    yield from merging.render(report, voice, planned=planned)
    if report.restored:
        words = f"{plural(report.restored, 'tensor')} equal to the base in every bit"
        words += f", {report.kept} never changed" if report.kept else ""
        yield line(
            "same",
            f"{words}, checked",
            f"{plural(report.corrected, 'element')} set right",
            tone="good",
        )


# ------------------------------------------------------------------------ adapter − adapter


def _subtract_adapters(
    adapters: tuple[str, ...], output: str, options: dict[str, Any], voice: Voice
) -> None:
    from loratool.report.combine import DifferenceReport

    if len(adapters) > 1:
        how = f"rank {options['rank']}" if options["rank"] else "exact: ranks add"
        first = merging.weighted(adapters[:1])[0].removeprefix("1·")
        minus = " − ".join(merging.weighted(adapters[1:], Mix(weights=options["weights"])))
        base = "the base for what depends on it" if options["base"] else "no base"
        voice.announce(f"Subtracting adapters, {base}: {first} − {minus}, {how}")
    with voice.watching(combine.plan_lines) as plan:
        report = lt.subtract(adapters, output=output, **plan.options, **options)
    assert isinstance(report, DifferenceReport)
    voice.show_made(report, combine.render(report, voice, plan.report), [report.output])
