"""The command line: parse, call one function of `loratool`, render, exit code.

`main` is the only place where errors become text and numbers.
"""

from __future__ import annotations

import difflib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from loratool.errors import LoratoolError

_SIGPIPE_EXIT = 141
_INTERRUPT, _TERMINATE = "interrupt", "terminate"
_received: list[str] = []  # the signal of this process, if one came


class Terminated(BaseException):
    """SIGTERM or SIGHUP arrived; not an `Exception`, so that no cleanup code swallows it."""


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit.

    Args:
        argv: arguments after the program's name; None = those of the process.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    _prepare_streams()
    _catch_signals()
    code = run(args)
    if _received:  # a thread that an interrupted run left behind must not hold the exit up
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def run(args: list[str]) -> int:
    """Run the command line; returns the exit code."""
    import click

    from loratool.cli.render import safe
    from loratool.errors import AlreadyMadeError, LoratoolError

    options = args[: args.index("--")] if "--" in args else args
    try:
        _refuse_secrets(args)
        code = _invoke(args)
        sys.stdout.flush()
        return code
    except BaseException as error:
        if _received or isinstance(error, (KeyboardInterrupt, Terminated, click.Abort)):
            return _interrupted(error, options)
        if isinstance(error, AlreadyMadeError):
            click.echo(f"made by the interrupted run: {safe(str(error.file))}")
            return 0
        if isinstance(error, LoratoolError):
            return _report_error(error, options)
        if isinstance(error, click.ClickException):
            return _report_error(_usage_error(error), options)
        if isinstance(error, BrokenPipeError):
            _silence_stdout()
            return _SIGPIPE_EXIT
        if isinstance(error, MemoryError):
            return _report_error(_out_of_memory(), options)
        if isinstance(error, OSError):  # such as a report that goes to a full disk
            return _report_error(_refused(error), options)
        if isinstance(error, Exception):
            return _report_bug(error, options)
        raise


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

    if instruction := os.environ.get("_LORATOOL_COMPLETE"):
        from click.shell_completion import shell_complete

        return shell_complete(root, {}, "loratool", "_LORATOOL_COMPLETE", instruction)
    try:
        with root.make_context("loratool", list(args), color=_color()) as ctx:
            result = root.invoke(ctx)
    except click.exceptions.Exit as done:
        return done.exit_code
    return result if isinstance(result, int) else 0


# ---------------------------------------------------------------------------------- errors


def _report_error(error: LoratoolError, options: Sequence[str]) -> int:
    import click

    from loratool.cli.render import safe

    if "--json" in options:
        _print_json_error(options, error.to_json())
    else:
        head = click.style(f"error[{error.code}]:", fg="red", bold=True)
        click.echo(f"{head} {safe(error.message(), cap=4000)}", err=True, color=_color())
        if _is_verbose(options) and error.__cause__ is not None:
            _print_traceback(error)
    return error.exit_code


def _report_bug(error: Exception, options: Sequence[str]) -> int:
    import click

    from loratool.cli.render import safe

    what = f"{type(error).__name__}: {error}"
    if "--json" in options:
        _print_json_error(
            options, {"code": "LT-001", "exit_code": 1, "what": f"unexpected {what}", "bug": True}
        )
    else:
        head = click.style("error[LT-001]:", fg="red", bold=True)
        hint = "hint run it again with -v and report what it prints"
        text = f"{head} this is a bug in loratool · {safe(what, cap=600)} · {hint}"
        click.echo(text, err=True, color=_color())
    if _is_verbose(options):
        _print_traceback(error)
    return 1


def _print_json_error(options: Sequence[str], error: dict[str, Any]) -> None:
    from loratool.cli.group import COMMANDS
    from loratool.cli.render import dump_json
    from loratool.report import SCHEMA

    command = next((word for word in options if word in COMMANDS), None)
    print(dump_json({"schema": SCHEMA, "command": command, "ok": False, "error": error}))


def _print_traceback(error: BaseException) -> None:
    from loratool.cli.render import safe

    for entry in traceback.format_exception(error):
        for text in entry.rstrip("\n").split("\n"):
            print(safe(text, cap=1000), file=sys.stderr)


def _usage_error(error: Any) -> LoratoolError:
    """A click error in our form, with what this version lacks said as such."""
    from loratool.cli.group import LATER_OPTIONS
    from loratool.errors import UsageError

    ctx = getattr(error, "ctx", None)
    path = ctx.command_path if ctx is not None else "loratool"
    what = error.format_message().strip().rstrip(".")
    name = getattr(error, "option_name", "") or ""
    if name in LATER_OPTIONS:
        what = f"{path} has no {name} in this version"
    elif close := difflib.get_close_matches(name, getattr(error, "possibilities", None) or (), n=1):
        return UsageError("LT-204", f"no option {name}", hint=f"did you mean {close[0]}?")
    return UsageError("LT-204", what[:1].lower() + what[1:], hint=f"{path} --help")


def _refused(error: OSError) -> LoratoolError:
    from loratool.errors import DiskError

    return DiskError(
        "LT-609", "the system refused to read or write", file=error.filename,
        got=error.strerror or str(error),
    )  # fmt: skip


def _out_of_memory() -> LoratoolError:
    from loratool.errors import DiskError

    return DiskError(
        "LT-608", "out of memory", hint="--max-memory plans with less, --threads 1 needs less"
    )


def _interrupted(error: BaseException, options: Sequence[str]) -> int:
    """Report a signal, whatever error it surfaced as; notes say what became of the output."""
    code = 143 if isinstance(error, Terminated) or _received[:1] == [_TERMINATE] else 130
    notes = getattr(error, "__notes__", [])
    if "--json" in options:
        what = {"code": "LT-000", "exit_code": code, "what": "interrupted"}
        _print_json_error(options, what | ({"hint": "; ".join(notes)} if notes else {}))
    else:
        from loratool.cli.render import safe

        text = " · ".join(["interrupted", "inputs are unchanged", *notes])
        print(safe(text, cap=4000), file=sys.stderr)
    return code


def _is_verbose(options: Sequence[str]) -> bool:
    return "-v" in options or "--verbose" in options or os.environ.get("LORATOOL_DEBUG") == "1"


def _color() -> bool | None:
    return False if os.environ.get("NO_COLOR") else None


# ----------------------------------------------------------------------- streams and signals


def _prepare_streams() -> None:
    """A terminal that cannot show a character shows its escape instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def _silence_stdout() -> None:
    """Give the interpreter's last flush somewhere to go after the reader has left."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(devnull, sys.stdout.fileno())
    except (OSError, ValueError):
        pass
    finally:
        os.close(devnull)


def _catch_signals() -> None:
    """The first signal ends the run in order; the second one kills."""
    for number in _signals():
        if number == signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _on_signal)


def _signals() -> list[int]:
    names = ("SIGINT", "SIGTERM", "SIGHUP")
    return [int(getattr(signal, name)) for name in names if hasattr(signal, name)]


def _on_signal(number: int, _frame: FrameType | None) -> None:
    for other in _signals():
        if signal.getsignal(other) is _on_signal:
            signal.signal(other, signal.SIG_DFL)
    _received.append(_INTERRUPT if number == signal.SIGINT else _TERMINATE)
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated
