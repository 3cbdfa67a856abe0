"""How fast a disk is right now, by a short look past the page cache; nothing is left behind."""

from __future__ import annotations

import errno
import mmap
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

PROBE_BYTES = 64 << 20
_PIECE = 4 << 20
_MOST_S = 1.0
_FEWEST = 4  # pieces; less tells nothing


def read_speed(files: Iterable[Path]) -> float | None:
    """Bytes per second of reads from files that hold data.

    None where it cannot be told: a file system that knows no direct reads, or files that are
    mostly holes.
    """
    flags = os.O_RDONLY | getattr(os, "O_DIRECT", 0)
    if not hasattr(os, "O_DIRECT") or not hasattr(os, "preadv"):
        return None
    buffer = mmap.mmap(-1, _PIECE)  # page-aligned, as direct reads want it
    return _speed(_reads(files, flags, buffer))


def _reads(files: Iterable[Path], flags: int, buffer: mmap.mmap) -> Iterator[int]:
    for path in files:
        try:
            fd = os.open(path, flags)
        except OSError:
            continue
        try:
            for start in _data(fd, os.fstat(fd).st_size):
                yield os.preadv(fd, [buffer], start)
        except OSError:
            continue
        finally:
            os.close(fd)


def _data(fd: int, size: int) -> Iterator[int]:
    """A few places of whole pieces that are no holes."""
    for part in range(4):
        start = size * part // 4 // _PIECE * _PIECE
        hole = os.lseek(fd, start, os.SEEK_HOLE)
        if hole - start >= _PIECE:
            yield start


def write_speed(folder: Path) -> float | None:
    """Bytes per second of writes into a folder, synced; into a file that never has a name.

    None where the file system knows no such files, or no direct writes.
    """
    flags = getattr(os, "O_TMPFILE", 0) and os.O_TMPFILE | os.O_WRONLY | os.O_DIRECT
    if not flags:
        return None
    try:
        fd = os.open(folder, flags, 0o600)
    except OSError:
        return None
    try:
        return _speed(_writes(fd))
    finally:
        os.close(fd)


def takes_direct(folder: Path) -> bool | None:
    """Whether files of a folder are read and written past the page cache.

    None where that cannot be told without a file that has a name.
    """
    flags = getattr(os, "O_TMPFILE", 0) and os.O_TMPFILE | os.O_RDWR | os.O_DIRECT
    if not flags:
        return False if not hasattr(os, "O_DIRECT") else None
    try:
        fd = os.open(folder, flags, 0o600)
    except OSError as error:
        return False if error.errno == errno.EINVAL else None
    try:
        return os.write(fd, mmap.mmap(-1, mmap.PAGESIZE)) == mmap.PAGESIZE
    except OSError:
        return False
    finally:
        os.close(fd)


def _writes(fd: int) -> Iterator[int]:
    buffer = mmap.mmap(-1, _PIECE)
    buffer.write(os.urandom(_PIECE))  # some disks make nothing of zeros
    try:
        while True:
            done = os.write(fd, buffer)
            os.fsync(fd)
            yield done
    except OSError:
        return


def are_on_one_disk(one: Path, other: Path) -> bool:
    """True if two places share a device, and so its speed."""
    return one.stat().st_dev == other.stat().st_dev


def _speed(pieces: Iterator[int]) -> float | None:
    done = count = 0
    started = time.monotonic()
    for size in pieces:
        done, count = done + size, count + 1
        if done >= PROBE_BYTES or (count >= _FEWEST and time.monotonic() - started > _MOST_S):
            break
    seconds = time.monotonic() - started
    return done / seconds if count >= _FEWEST and done else None
