"""A crc32 for every piece of a file, taken while it is written, checked before it is trusted.

And the hashes by which the Hub knows files.
"""

from __future__ import annotations

import functools
import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TypeVar

try:  # the same sums, ten times as fast
    from isal.isal_zlib import crc32 as crc32
except ImportError:  # no wheel for this machine
    from zlib import crc32 as crc32

_READ_BYTES = 4 << 20
_CHECKERS = 4  # one thread's crc32 is no faster than the disk
_POLYNOMIAL = 0xEDB88320  # of crc32, bits reversed

T = TypeVar("T")

Piece = tuple[int, int, int]
"""(offset, length, crc32)"""


class PieceSums:
    """Checksums of the pieces of one file, from any thread and in any order."""

    def __init__(self) -> None:
        self._pieces: list[Piece] = []

    def add(self, offset: int, data: memoryview) -> None:
        """Sum a piece (no lock: crc32 lets other threads run, and append is atomic)."""
        if data:
            self._pieces.append((offset, len(data), crc32(data)))

    def take(self, pieces: Iterable[Piece]) -> None:
        """Take in the sums of pieces that somebody else wrote."""
        self._pieces.extend(pieces)

    def drop_first(self) -> None:
        """Forget the piece at the beginning of the file: it will be written again."""
        self._pieces.remove(min(self._pieces))

    def pieces(self) -> list[Piece]:
        """All of them, in file order."""
        return sorted(self._pieces)


def sum_file(path: Path) -> list[Piece]:
    """The sums of a finished file, read back in pieces."""
    with path.open("rb", buffering=0) as file:
        return sum_stream(file)


def sum_stream(file: IO[bytes]) -> list[Piece]:
    """The sums of what an open file still gives."""
    sums, at = PieceSums(), 0
    while data := file.read(_READ_BYTES):
        sums.add(at, memoryview(data))
        at += len(data)
    return sums.pieces()


def sum_whole(pieces: Iterable[Piece]) -> tuple[int, int]:
    """(size, crc32) of a whole file from the sums of its pieces, in file order."""
    size = crc = 0
    for _offset, length, part in pieces:
        crc = _times(_shift(length), crc) ^ part
        size += length
    return size, crc


@functools.lru_cache(maxsize=4096)
def _shift(length: int) -> int:
    """X to the power of 8·length modulo the polynomial: what so many bytes do to a crc before."""
    power, factor = 1 << 30, 1 << 31  # x, 1
    bits = 8 * length
    while bits:
        if bits & 1:
            factor = _times(power, factor)
        power = _times(power, power)
        bits >>= 1
    return factor


def _times(one: int, other: int) -> int:
    """Product of two polynomials over GF(2) modulo that of crc32; bit 31 is the constant term."""
    product = 0
    for _ in range(32):
        if one & 0x80000000:
            product ^= other
        one = one << 1 & 0xFFFFFFFF
        other = other >> 1 ^ (_POLYNOMIAL if other & 1 else 0)
    return product


def check_all(items: Sequence[T], is_good: Callable[[T, threading.Event], bool]) -> list[bool]:
    """``is_good`` of every item, several at a time; its event is set when nobody waits any more."""
    stop = threading.Event()
    with ThreadPoolExecutor(_CHECKERS) as pool:
        try:
            return list(pool.map(lambda item: is_good(item, stop), items))
        finally:
            stop.set()  # after Ctrl-C nobody waits for the rest
            pool.shutdown(cancel_futures=True)


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
        found, left = crc32(data, found), left - len(data)
    return found == crc


# ------------------------------------------------------------------------- as the Hub has them


def digest_of(path: Path, like: str) -> str:
    """Hash of a file in the form of ``like``: sha256 (64 digits) or git blob id (40)."""
    with path.open("rb") as file:
        made = hash_like(like, os.fstat(file.fileno()).st_size)
        while part := file.read(1 << 20):
            made.update(part)
    return made.hexdigest()


def hash_like(like: str, size: int) -> hashlib._Hash:
    """A hash to be fed with ``size`` bytes: sha256 for 64 digits, a git blob id for 40."""
    if len(like) == 64:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
