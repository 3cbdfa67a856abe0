"""Several outputs of one command, made one after the other: a killed series goes on.

Before an output is made, a line says so: where, what makes it, and the inputs as they are.  When
the same command is given again and finds that output complete and the inputs unchanged, it is one
that the killed series made, and stays.  The file with these lines goes away with the series' end.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict

from loratool.errors import OutputError
from loratool.shapes import fitting
from loratool.store.disk import refusals_as, sync_folder, write_all
from loratool.store.journal import encode, read_lines

Stamps = Mapping[str, list[int]]


class Begun(TypedDict):
    """An output that is about to be made."""

    output: str
    plan: str
    inputs: dict[str, list[int]]


class Series:
    """The outputs of one command.

    Args:
        journal: where the lines are kept.

    Raises:
        OutputError: LT-511, something else lies there.
    """

    def __init__(self, journal: Path) -> None:
        self._journal = journal
        lines = [line for raw in read_lines(journal) if (line := fitting(raw, Begun))]
        if os.path.lexists(journal) and not _may_be_own(journal, has_lines=bool(lines)):
            raise OutputError(
                "LT-511", "something else lies where notes about this run would be kept",
                file=journal, hint="move it away",
            )  # fmt: skip
        self._begun = {line["output"]: line for line in lines}

    def was_begun(self, path: Path) -> bool:
        """True if a run before this one was about to make this output."""
        return str(path.absolute()) in self._begun

    def is_same(self, path: Path, plan: str, inputs: Stamps) -> bool:
        """True if the run before was about to make exactly this."""
        line = self._begun.get(str(path.absolute()))
        return line is not None and (line["plan"], line["inputs"]) == (plan, inputs)

    def begin(self, path: Path, plan: str, inputs: Stamps) -> None:
        """Say that an output is about to be made, at a place that is free.

        Where nothing may be written, nothing is: such a run begins anew.
        """
        line: Begun = {"output": str(path.absolute()), "plan": plan, "inputs": dict(inputs)}
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        with refusals_as("cannot write", self._journal):
            try:
                fd = os.open(self._journal, flags, 0o666)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EROFS):
                    return
                raise
            try:
                write_all(fd, b"\n" + encode(line))  # after a torn line, a whole one
                os.fsync(fd)
            finally:
                os.close(fd)
            sync_folder(self._journal.parent)

    def end(self) -> None:
        """Everything is made."""
        self._journal.unlink(missing_ok=True)


def _may_be_own(journal: Path, *, has_lines: bool) -> bool:
    """True for a plain file of no other name that holds lines, or nothing yet."""
    found = journal.lstat()
    return stat.S_ISREG(found.st_mode) and found.st_nlink == 1 and (has_lines or not found.st_size)


@contextmanager
def series(journal: Path, within: Series | None = None) -> Iterator[Series]:
    """Outputs that are given what this yields are a series; one within another is part of that.

    After an error the lines stay: the same command goes on.
    """
    if within is not None:
        yield within
        return
    made = Series(journal)
    yield made
    made.end()


def may_be_made(path: Path, series: Series | None) -> bool:
    """True if an interrupted run of a series may have made an output."""
    return series is not None and series.was_begun(path)
