"""Standard streams that may be closed, full or broken without harm to the work.

What cannot be printed is dropped, and the run goes on: a merge must not die because nobody reads
its notes.  `finish` then says what the exit code is.
"""

from __future__ import annotations

import errno
import io
import os
import sys

TYPE_CHECKING = False  # see `loratool.cli`
if TYPE_CHECKING:
    from typing import Any

BROKEN_PIPE = 141
"""Exit code of a run that did its work while the reader of its stdout left: 128 + SIGPIPE."""


class LenientStream(io.RawIOBase):
    """Bytes to a descriptor; the first failure is kept, what follows is dropped.

    Args:
        raw: what writes.

    Attributes:
        failure: the first error.
    """

    def __init__(self, raw: Any) -> None:
        self._raw = raw
        self.failure: OSError | None = None

    def writable(self) -> bool:
        """True."""
        return True

    def fileno(self) -> int:
        """Of the descriptor."""
        return int(self._raw.fileno())

    def isatty(self) -> bool:
        """True for a terminal."""
        return bool(self._raw.isatty())

    def write(self, data: Any) -> int:
        """Write all bytes, or drop what cannot be written."""
        rest = memoryview(data).cast("B")
        while rest and self.failure is None:
            try:
                count = self._raw.write(rest)
            except OSError as error:
                self.failure = error
                break
            if count is None:  # the descriptor does not block, and its reader is slow
                import select

                select.select([], [self._raw], [])
            rest = rest[count or 0 :]
        return memoryview(data).nbytes


def prepare() -> None:
    """Make the standard streams of this process lenient; closed ones become the null device.

    A file opened while descriptor 1 is free would get it, and our text would end up in it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if sys.stdin is None:
        sys.stdin = sys.__stdin__ = open(0, closefd=False)  # type: ignore[misc]  # noqa: SIM115
    sys.stdout = sys.__stdout__ = _lenient(sys.stdout, 1)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = _lenient(sys.stderr, 2)  # type: ignore[misc]


def _lenient(stream: Any, descriptor: int) -> Any:
    """The same stream; a character that a terminal cannot show becomes its escape."""
    if stream is None:
        stream = open(descriptor, "w", closefd=False, encoding="utf-8")  # noqa: SIM115
    encoding, lines = getattr(stream, "encoding", None), getattr(stream, "line_buffering", False)
    buffer = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)
    if not isinstance(raw, io.RawIOBase) or isinstance(raw, LenientStream):
        return stream  # somebody else's: a test's, an editor's
    lenient: Any = LenientStream(raw)
    stream.detach()
    if buffer is not None and buffer is not raw:  # they are one with `python -u`
        buffer.detach()
        lenient = io.BufferedWriter(lenient)
    return io.TextIOWrapper(
        lenient, encoding=encoding, errors="backslashreplace", line_buffering=lines,
        write_through=buffer is raw,
    )  # fmt: skip


def finish(code: int) -> int:
    """The exit code: of a run that went well another one if its report could not be printed.

    A lost message on stderr changes nothing, and an error keeps its own code.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    buffer = getattr(sys.stdout, "buffer", None)
    failure = getattr(getattr(buffer, "raw", buffer), "failure", None)
    if code or failure is None:
        return code
    if failure.errno == errno.EPIPE:
        return BROKEN_PIPE
    from loratool.cli.failures import report

    return report(failure, [])
