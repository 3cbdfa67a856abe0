"""The command line: parse, call one function of `loratool`, render, exit code.

Everything is imported where it is used: until `main` has caught the signals, one of them is a
traceback.
"""

import os
import sys

TYPE_CHECKING = False  # typing takes longer to import than all that comes before `catch`
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import NoReturn


def main(argv: "Sequence[str] | None" = None) -> "NoReturn":
    """Run the command line as a program and exit.

    Args:
        argv: arguments after the program's name; None = those of the process.
    """
    from loratool.cli import signals

    args = list(sys.argv[1:] if argv is None else argv)
    try:
        signals.catch()
        code = _with_streams(run, args)
        signals.settle(code)
    except (KeyboardInterrupt, signals.Terminated) as error:
        code = _with_streams(_report, args, error)
    signals.leave(code, at_once=argv is None)


def _with_streams(work: "Callable[..., int]", *args: object) -> int:
    from loratool.cli import streams

    streams.prepare()
    return streams.finish(work(*args))


def run(args: list[str]) -> int:
    """Run the command line; returns the exit code."""
    try:
        _refuse_secrets(args)
        return _invoke(args)
    except BaseException as error:
        return _report(args, error)


def _report(args: list[str], error: BaseException) -> int:
    try:
        from loratool.cli.failures import report

        return report(error, args)
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


def _invoke(args: list[str]) -> int:
    """What `click.Command.main` does, less its own handling of errors and broken pipes."""
    import click

    from loratool.cli.group import root

    color = False if os.environ.get("NO_COLOR") else None
    if instruction := os.environ.get("_LORATOOL_COMPLETE"):
        from click.shell_completion import shell_complete

        return shell_complete(root, {}, "loratool", "_LORATOOL_COMPLETE", instruction)
    try:
        with root.make_context("loratool", list(args), color=color) as ctx:
            result = root.invoke(ctx)
    except click.exceptions.Exit as done:
        return done.exit_code
    return result if isinstance(result, int) else 0
