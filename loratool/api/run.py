"""`run`: several commands from one recipe."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loratool.api.access import check_files
from loratool.api.compare import compare
from loratool.api.compress import compress
from loratool.api.convert import convert
from loratool.api.extract import extract
from loratool.api.inspect import inspect
from loratool.api.merge import merge
from loratool.api.pull import pull
from loratool.api.push import push
from loratool.api.rescale import rescale
from loratool.api.subtract import subtract, swap
from loratool.api.verify import verify
from loratool.errors import AlreadyMadeError, DifferencesError, LoratoolError, list_some
from loratool.ops.inputs import guard_output
from loratool.ops.recipe import RecipeStep, read_recipe
from loratool.options.calls import takes
from loratool.options.commands import COMMANDS
from loratool.options.groups import Watch
from loratool.options.recipes import Recipe
from loratool.options.words import Options, only_of
from loratool.report.base import Report
from loratool.report.run import RunReport, StepReport
from loratool.report.text import plural
from loratool.store.places import notes_path
from loratool.store.series import Series, series

_STEPS: dict[str, Callable[..., Report]] = {
    function.__name__: function
    for function in (
        inspect, merge, extract, subtract, compress, swap, rescale, convert, compare, verify, pull,
        push,
    )
}  # fmt: skip
"""The commands that a recipe may call."""


@takes(Recipe)
def run(asked: Recipe) -> RunReport:
    """Run the steps of a recipe in order; the first error stops it.

    Relative paths are relative to the recipe's folder: the working directory is that one while
    the steps run.  The whole file is checked before the first step.

    Raises:
        UsageError: LT-287, LT-288, with the line.
        DifferencesError: LT-110, a step ran to its end and its answer is no (``verify``).
        LoratoolError: what the step raised, with its number and line.
    """
    started = time.monotonic()
    path = Path(asked.recipe)
    steps = read_recipe(path, step_options())
    done: list[StepReport] = []
    say = asked.on_step or (lambda step, report: None)
    real = path.resolve()
    with contextlib.chdir(path.absolute().parent), _series(steps, asked.dry_run) as series:
        for place in (place for step in steps for place in step.outputs):
            guard_output(Path(place), [real])
        for step in steps:
            say(step, None)
            waits = step.needs(steps[: step.number - 1]) if asked.dry_run else ()
            begun = time.monotonic()
            common = {"dry_run": asked.dry_run, "offline": asked.offline, "yes": asked.yes,
                      "series": series, **vars(asked.take(Watch))}  # fmt: skip
            report, was_made = None, False
            try:
                report = None if waits else _call(step, len(steps), common)
            except AlreadyMadeError:
                was_made = True
            one = StepReport(
                step.number, step.command, step.line, step.output, report, waits,
                time.monotonic() - begun, was_made,
            )  # fmt: skip
            done.append(one)
            say(step, one)
    return RunReport(str(path), tuple(done), time.monotonic() - started, asked.dry_run)


def _series(
    steps: Sequence[RecipeStep], dry_run: bool
) -> contextlib.AbstractContextManager[Series | None]:
    """Where notes for a rerun are kept: beside the first output."""
    outputs = [step.output for step in steps if step.output]
    if dry_run or not outputs:
        return contextlib.nullcontext()
    return series(notes_path(Path(outputs[0])))


def step_options() -> dict[str, type[Options]]:
    """Name -> options of every command that a recipe may call."""
    return {name: COMMANDS[name] for name in _STEPS}


def _call(step: RecipeStep, count: int, common: Mapping[str, Any]) -> Report:
    options = {**step.options, **only_of(COMMANDS[step.command], common)}
    where = f"step {step.number} of {count} ({step.command}, line {step.line})"
    try:
        if common["dry_run"]:  # what is drawn would be in the way of the run itself
            check_files(*(options.pop(name, None) for name in ("csv", "plot", "html")))
        report = _STEPS[step.command](**options)
    except LoratoolError as error:
        is_there = error.code == "LT-501"
        raise type(error)(
            error.code, f"{where}: {error.what}", file=error.file, key=error.key,
            expected=error.expected, got=error.got,
            hint="another output:, or force: true in this step" if is_there else error.hint,
        ) from error  # fmt: skip
    assert isinstance(report, Report)
    if not report.ok:
        verdict, failed = getattr(report, "verdict", ""), getattr(report, "failed", ())
        if failed:
            raise DifferencesError("LT-110", f"{where}: {plural(len(failed), 'adapter')} left out",
                                   key=list_some(one.source for one in failed))  # fmt: skip
        raise DifferencesError("LT-110", f"{where}: found differences", got=verdict or None)
    return report
