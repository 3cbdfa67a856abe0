"""The command line: parse, call one function of `loratool`, render, exit code.

Everything is imported where it is used: until `main` has caught the signals, one of them is a
traceback.
"""

import gc
import os
import sys

TYPE_CHECKING = False  # typing takes longer to import than all that comes before `catch`
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any, NoReturn

    from loratool.cli.signals import Caught

_SEARCH_AFTER = 50_000
"""New objects before Python looks for circles of garbage among them; its 700 are there 50 times
while a command loads its modules and reads a header, which make none."""


def main(argv: "Sequence[str] | None" = None) -> "NoReturn":
    """Run the command line as a program and exit.

    Args:
        argv: arguments after the program's name; None = those of the process.
    """
    from loratool.cli import signals

    gc.set_threshold(_SEARCH_AFTER)
    args = list(sys.argv[1:] if argv is None else argv)
    caught = signals.Caught()
    try:
        caught.catch()
        code = _with_streams(run, args, caught)
        caught.settle(code)
    except (KeyboardInterrupt, signals.Terminated) as error:
        code = _with_streams(_report, args, error, caught)
    caught.leave(code, at_once=argv is None)


def _with_streams(work: "Callable[..., int]", *args: object) -> int:
    from loratool.cli import streams

    streams.prepare()
    return streams.finish(work(*args))


def run(args: list[str], caught: "Caught | None" = None) -> int:
    """Run the command line; returns the exit code.

    Args:
        args: after the program's name.
        caught: signals that came; None = this run does not catch them.
    """
    try:
        _refuse_secrets(args)
        return invoke(args)
    except BaseException as error:
        return _report(args, error, caught)


def _report(args: list[str], error: BaseException, caught: "Caught | None") -> int:
    try:
        from loratool.cli.failures import report

        return report(error, args, caught)
    except MemoryError:  # not enough for a sentence of its own
        os.write(2, b"error[LT-608]: out of memory\n")
        return 6


def _refuse_secrets(args: list[str]) -> None:
    """No argument may hold an access token: process lists and shell histories keep it."""
    from loratool.errors import TOKEN

    for word in args:
        if TOKEN.search(word) and not os.path.lexists(word.rpartition(":")[0] or word):
            from loratool.store.source import refuse_token

            refuse_token(word)


def invoke(args: list[str], given: "Mapping[str, Any] | None" = None) -> int:
    """What `click.Command.main` does, less its own handling of errors and broken pipes.

    Args:
        args: after the program's name.
        given: options of Python alone, for commands that take them.
    """
    import click

    from loratool.cli.group import root

    color = False if os.environ.get("NO_COLOR") else None
    if args[:1] == ["help"]:
        args = [*args[1:], "--help"]
    if instruction := os.environ.get("_LORATOOL_COMPLETE"):
        from click.shell_completion import shell_complete

        return shell_complete(root, {}, "loratool", "_LORATOOL_COMPLETE", instruction)
    try:
        with root.make_context("loratool", list(args), color=color, obj=given) as ctx:
            result = root.invoke(ctx)
    except click.exceptions.Exit as done:
        return done.exit_code
    return result if isinstance(result, int) else 0
