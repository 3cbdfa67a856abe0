"""Errors become text and numbers, here and nowhere else."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import click

from loratool.cli.group import COMMANDS
from loratool.cli.options import meant_option
from loratool.cli.render import (
    cell_width,
    dump_json,
    is_terminal,
    safe,
    terminal_width,
    wrapped,
)
from loratool.cli.signals import Caught, Terminated
from loratool.errors import PARTS, AlreadyMadeError, DiskError, LoratoolError, UsageError
from loratool.lazy import regex
from loratool.report.base import SCHEMA

_NO_MEMORY = regex(
    "out of memory|(can't|cannot) allocate memory|not enough memory|bad_alloc|ALLOC_FAILED"
    "|can't start new thread|failed to map segment", re.IGNORECASE,
)  # fmt: skip
"""What torch, CUDA's libraries, the loader and Python say where `MemoryError` would be right."""


def report(error: BaseException, args: Sequence[str], caught: Caught | None = None) -> int:
    """Say what went wrong; returns the exit code.

    Args:
        error: whatever ended the run.
        args: of the command line.
        caught: signals that came.
    """
    options = args[: args.index("--")] if "--" in args else args
    caught = Caught() if caught is None else caught
    if caught.numbers or isinstance(error, (KeyboardInterrupt, Terminated, click.Abort)):
        return _interrupted(error, options, caught.tell(error))
    if isinstance(error, AlreadyMadeError):
        click.echo(f"made by the interrupted run: {safe(str(error.file))}")
        return 0
    if isinstance(error, LoratoolError):
        return _report_error(error, options)
    if isinstance(error, click.ClickException):
        return _report_error(_usage_error(error, options), options)
    if _is_out_of_memory(error):
        return _report_error(_out_of_memory(), options)
    if isinstance(error, OSError):  # such as a report that goes to a full disk
        return _report_error(_refused(error), options)
    if isinstance(error, Exception):
        return _report_bug(error, options)
    raise error


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (RuntimeError, ImportError, OSError)):
        return _NO_MEMORY.search(str(error)) is not None
    return isinstance(error, MemoryError)


def _report_error(error: LoratoolError, options: Sequence[str]) -> int:
    if "--json" in options:
        _print_json_error(options, error.to_json())
    else:
        head = click.style(f"error[{error.code}]:", fg="red", bold=True)
        click.echo(f"{head} {_laid_out(error)}", err=True, color=_color())
        if _is_verbose(options) and error.__cause__ is not None:
            _print_traceback(error)
    return error.exit_code


def _laid_out(error: LoratoolError) -> str:
    """One line; on a terminal too narrow for it one for each part."""
    text, columns = safe(error.message(), cap=4000), terminal_width()
    if not is_terminal(sys.stderr) or cell_width(f"error[{error.code}]: {text}") <= columns:
        return text
    said = error.to_json()
    parts = [(label, str(said[label])) for label in PARTS if label in said]
    start = " " * len(f"error[{error.code}]: ")
    lines = [wrapped(start + safe(error.what, cap=4000), columns, len(start))[len(start) :]]
    for label, part in parts:
        whole = f"{label:10}{safe(part, cap=4000)}"
        whole = whole if label == "hint" else wrapped(whole, columns, 10)
        lines.append(click.style(label, bold=True) + whole[len(label) :])
    return "\n".join(lines)


def _report_bug(error: Exception, options: Sequence[str]) -> int:
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
    command = next((word for word in options if word in COMMANDS), None)
    print(dump_json({"schema": SCHEMA, "command": command, "ok": False, "error": error}))


def _print_traceback(error: BaseException) -> None:
    for entry in traceback.format_exception(error):
        for text in entry.rstrip("\n").split("\n"):
            print(safe(text, cap=1000), file=sys.stderr)


def _usage_error(error: Any, options: Sequence[str]) -> LoratoolError:
    """A click error in our form, with what was probably meant."""
    command = next((word for word in options if word in COMMANDS), None)
    path = f"loratool {command}" if command else "loratool"
    if isinstance(error, click.NoSuchOption):
        hint = meant_option(error.option_name, error.ctx) or f"{path} --help"
        return UsageError("LT-204", f"no option {error.option_name}", hint=hint)
    what = error.format_message().strip().rstrip(".")
    is_missing = isinstance(error, click.MissingParameter) and isinstance(error.param, click.Option)
    return UsageError("LT-204", what[:1].lower() + what[1:], hint=f"{path} --help",
                      expected=error.param.help if is_missing else None)  # fmt: skip


def _refused(error: OSError) -> LoratoolError:
    return DiskError(
        "LT-609", "the system refused to read or write", file=error.filename,
        got=error.strerror or str(error),
    )  # fmt: skip


def _out_of_memory() -> LoratoolError:
    return DiskError(
        "LT-608", "out of memory", hint="--max-memory plans with less, --threads 1 needs less"
    )


def _interrupted(error: BaseException, options: Sequence[str], code: int) -> int:
    """Report a signal, whatever error it surfaced as; notes say what became of the output."""
    notes = getattr(error, "__notes__", [])
    if "--json" in options:
        what = {"code": "LT-000", "exit_code": code, "what": "interrupted"}
        _print_json_error(options, what | ({"hint": "; ".join(notes)} if notes else {}))
    else:
        text = " · ".join(["interrupted", "inputs are unchanged", *notes])
        print(safe(text, cap=4000), file=sys.stderr)
    return code


def _is_verbose(options: Sequence[str]) -> bool:
    return "-v" in options or "--verbose" in options or os.environ.get("LORATOOL_DEBUG") == "1"


def _color() -> bool | None:
    return False if os.environ.get("NO_COLOR") else None
