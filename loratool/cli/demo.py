"""``loratool demo``."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import loratool as lt
from loratool.cli import options as opt
from loratool.cli.render import line, safe
from loratool.cli.voice import Voice
from loratool.errors import AlreadyMadeError, UsageError

if TYPE_CHECKING:
    from loratool.store.series import Series


@click.command(
    cls=opt.Command,
    name="demo",
    short_help="A tour on a small built-in model, offline.",
    examples=("loratool demo", "loratool demo -o tour  # keeps the files to play with"),
)
@opt.option("-o", "--output", metavar="DIR", section="Output",
            help="Keep the files in this new folder. Default: removed at the end.")  # fmt: skip
@opt.general
def command(output: str | None, **options: Any) -> int:
    """Write a tiny model, two adapters and a fine-tune, and run the main commands on them."""
    from loratool.store.places import notes_path
    from loratool.store.series import series

    voice = Voice.take(options)
    if voice.as_json:
        if output is None:
            raise UsageError("LT-207", "demo --json writes files: say where", hint="-o DIR")
        voice.show(lt.demo(output), ())
        return 0
    with _folder(output) as folder, series(notes_path(Path(folder))) as made:
        report = lt.demo(folder, series=made)
        voice.announce("A tour on a model small enough to build in a moment")
        _run_all(report.commands, made, voice)
    if voice.quiet:
        return 0
    kept = f"the files are in {safe(output)}" if output else "with -o DIR the files are kept"
    click.echo("\n" + line("done", kept, tone="good"))
    return 0


@contextmanager
def _folder(output: str | None) -> Iterator[str]:
    """The folder to work in; a temporary one is entered, so that the commands read well."""
    if output is not None:
        yield output
        return
    with tempfile.TemporaryDirectory(prefix="loratool-") as parent, chdir(parent):
        yield "demo"


def _run_all(commands: Sequence[Sequence[str]], series: Series, voice: Voice) -> None:
    """Run command lines as if they were typed; the first that fails ends the tour."""
    from loratool.cli import invoke
    from loratool.cli.failures import report

    for words in commands:
        typed = safe(shlex.join(["loratool", *words]), cap=1000)
        if not voice.quiet:
            click.echo("\n" + click.style("$ ", dim=True) + click.style(typed, bold=True))
        try:
            code = invoke([*words, *(["-q"] if voice.quiet else [])], {"series": series})
        except AlreadyMadeError as error:
            code = report(error, words)
        if code:
            raise click.exceptions.Exit(code)
