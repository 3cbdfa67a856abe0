"""``loratool run``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click

import loratool as lt
from loratool.cli import options as opt
from loratool.cli.inspect import unit_of
from loratool.cli.progress import show_progress
from loratool.cli.render import format_seconds, format_share, is_terminal, line, plural, safe
from loratool.cli.voice import Voice, note_lines, warning_lines
from loratool.options.recipes import Recipe

if TYPE_CHECKING:
    from loratool.ops.recipe import RecipeStep
    from loratool.report.run import RunReport, StepReport

_TAKES_LONG = {"merge", "extract", "subtract", "swap", "verify"}


@click.command(
    cls=opt.Command,
    name="run",
    short_help="Several steps from one strict recipe file.",
    examples=(
        "loratool run recipe.yaml --dry-run       # check every line, plan what can be planned",
        "loratool run recipe.yaml",
    ),
)
@click.argument("recipe", metavar="RECIPE.yaml")
@opt.taking(Recipe)
@opt.general
def command(recipe: str, **options: Any) -> None:
    """Run the steps of RECIPE in order; the first error stops it.

    A recipe is a YAML file: `steps:`, a list of commands with their options under the names that
    they have here. Unknown and doubled keys are errors with their line, before anything runs.
    Relative paths are relative to the recipe.
    """
    voice = Voice.take(options)
    bar = _Bar(voice.quiet)

    def say(step: RecipeStep, report: StepReport | None) -> None:
        bar.turn(step if report is None else None)
        if voice.quiet or voice.as_json:
            return
        if report is None:
            if step.command in _TAKES_LONG and not is_terminal(sys.stderr):  # there a bar shows
                click.secho(f"{step.number}  {step.command} …", dim=True, err=True)
            return
        for text in _step(report, options["dry_run"], voice):
            click.echo(text)

    voice.announce(f"Running {safe(recipe)}" + (", planning only" if options["dry_run"] else ""))
    with bar:
        report = lt.run(recipe, on_step=say, progress=bar.progress, on_work=bar.on_work, **options)
    voice.show(report, _end(report), result=[safe(s.output) for s in report.steps if s.output])


class _Bar(ExitStack):
    """The progress of the step at work, each with a bar of its own."""

    def __init__(self, quiet: bool) -> None:
        super().__init__()
        self._quiet, self._watchers = quiet, {}  # type: ignore[var-annotated]

    def turn(self, step: RecipeStep | None) -> None:
        """A step begins; None = the one at work is done."""
        self.close()
        self._watchers = {}
        if step is not None:
            is_many = step.command == "inspect" and unit_of(str(step.options["source"])) == "files"
            unit = "files" if is_many else "bytes"
            self._watchers = self.enter_context(show_progress(quiet=self._quiet, unit=unit))

    def progress(self, done: int, total: int) -> None:
        """As the option."""
        if show := self._watchers.get("progress"):
            show(done, total)

    def on_work(self, name: str) -> None:
        """As the option."""
        if show := self._watchers.get("on_work"):
            show(name)


def _step(step: StepReport, dry_run: bool, voice: Voice) -> Iterator[str]:
    facts = [safe(step.output or "")] if step.output else []
    if step.waits_for:
        after = " and ".join(map(str, step.waits_for))
        word = "step" if len(step.waits_for) == 1 else "steps"
        facts.append(f"options checked; the rest is planned after {word} {after}")
    if step.was_made:
        facts.append("made by the interrupted run")
    facts += list(_figures(step))
    facts.append("" if dry_run else format_seconds(step.seconds))
    yield line(f"{step.number}  {step.command}", *facts, tone=None if dry_run else "good")
    report = step.report
    yield from warning_lines(getattr(report, "warnings", ()))
    for row in getattr(report, "adapters", ()):
        yield from warning_lines(getattr(row, "warnings", ()))
    if voice.verbose:
        yield from note_lines(getattr(report, "notes", ()), voice)


def _figures(step: StepReport) -> Iterator[str]:
    """The one figure that a step is judged by."""
    report = step.report
    if total := getattr(report, "total", None):
        lost = total.loss if not getattr(report, "dry_run", False) else total.predicted_loss
        yield f"rounds away {format_share(lost)}" if lost >= 1e-3 else f"loss {lost:.1g}"
    elif verdict := getattr(report, "verdict", ""):
        yield safe(verdict)
    elif (energy := getattr(report, "captured_energy", None)) is not None:
        yield f"energy {format_share(energy)}"
    rows = getattr(report, "adapters", ())
    how = [row.how for row in rows if hasattr(row, "how")]
    if how:
        yield f"{plural(len(how), 'adapter')}: {', '.join(dict.fromkeys(how))}"


def _end(report: RunReport) -> Iterator[str]:
    if report.dry_run:
        yield line("dry run", f"{plural(len(report.steps), 'step')}, nothing was written")
    else:
        yield line("done", plural(len(report.steps), "step"), format_seconds(report.seconds),
                   tone="good")  # fmt: skip
