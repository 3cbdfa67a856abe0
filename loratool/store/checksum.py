"""A crc32 for every piece of a file, taken while it is written, checked before it is trusted."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Sequence
from pathlib import Path

_READ_BYTES = 4 << 20

Piece = tuple[int, int, int]
"""(offset, length, crc32)"""


class PieceSums:
    """Checksums of the pieces of one file, from any thread and in any order."""

    def __init__(self) -> None:
        self._pieces: list[Piece] = []

    def add(self, offset: int, data: memoryview) -> None:
        """Sum a piece (no lock: crc32 lets other threads run, and append is atomic)."""
        if data:
            self._pieces.append((offset, len(data), zlib.crc32(data)))

    def pieces(self) -> list[Piece]:
        """All of them, in file order."""
        return sorted(self._pieces)


def sum_file(path: Path) -> list[Piece]:
    """The sum of a finished small file, as one piece."""
    data = path.read_bytes()
    return [(0, len(data), zlib.crc32(data))] if data else []


def is_intact(path: Path, size: int, pieces: Sequence[Piece], stop: threading.Event) -> bool:
    """True if a file still has the size and the bytes that were written.

    Args:
        path: the file.
        size: in bytes.
        pieces: they must cover the file, without gaps.
        stop: set by the caller to have no answer (False) at once.
    """
    try:
        with path.open("rb", buffering=0) as file:
            end = 0
            for offset, length, crc in pieces:
                if offset != end or not _matches(file, length, crc, stop):
                    return False
                end += length
            return end == size and not file.read(1)
    except OSError:
        return False


def _matches(file: object, length: int, crc: int, stop: threading.Event) -> bool:
    found, left = 0, length
    while left:
        data = file.read(min(left, _READ_BYTES))  # type: ignore[attr-defined]
        if not data or stop.is_set():
            return False
        found, left = zlib.crc32(data, found), left - len(data)
    return found == crc
