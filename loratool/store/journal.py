"""What an interrupted run has finished: one JSON object a line, each on the disk before the next.

The first line names the plan and the inputs as they were; every other line names a file of the
output that is complete, its size and the checksums of its pieces.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from loratool.store.checksum import is_intact
from loratool.store.disk import sync_folder, write_synced

NAME = ".journal"
Line = Mapping[str, Any]

_CHECKERS = 4  # one thread's crc32 is no faster than the disk


class Journal:
    """The journal of a staging folder.

    Args:
        folder: the staging folder.
        lines: what it starts with: the head, then the files that are complete already.
    """

    def __init__(self, folder: Path, lines: Iterable[Line]) -> None:
        self._lock = threading.Lock()
        path, new = folder / NAME, folder / f"{NAME}.tmp"
        new.unlink(missing_ok=True)
        write_synced(new, b"".join(_encode(line) for line in lines))
        new.replace(path)
        sync_folder(folder)
        self._file: BinaryIO = path.open("ab", buffering=0)

    def append(self, line: Line) -> None:
        """Add a line and wait until it is on the disk."""
        with self._lock:
            self._file.write(_encode(line))
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close; the file stays."""
        self._file.close()


def read_journal(folder: Path) -> list[dict[str, Any]]:
    """The lines of a journal; a torn or damaged line and what follows it do not count."""
    try:
        raw = (folder / NAME).read_bytes()
    except FileNotFoundError:
        return []
    lines: list[dict[str, Any]] = []
    for text in raw.split(b"\n")[:-1]:  # a torn last line has no newline
        try:
            value = json.loads(text)
        except ValueError:
            break
        if not isinstance(value, dict):
            break
        lines.append(value)
    return lines


def intact_files(folder: Path, lines: Sequence[Line]) -> dict[str, Line]:
    """Name -> line of the files whose bytes are still what the journal says."""
    stop = threading.Event()
    with ThreadPoolExecutor(_CHECKERS) as pool:
        try:
            good = list(pool.map(lambda line: _is_intact(folder, line, stop), lines))
        finally:
            stop.set()  # after Ctrl-C nobody waits for the rest
            pool.shutdown(cancel_futures=True)
    return {str(line["file"]): line for line, ok in zip(lines, good, strict=True) if ok}


def _is_intact(folder: Path, line: Line, stop: threading.Event) -> bool:
    name, size, pieces = line.get("file"), line.get("size"), line.get("crc32")
    if not isinstance(name, str) or not isinstance(size, int) or not isinstance(pieces, list):
        return False
    path = folder / name
    return not path.is_symlink() and is_intact(path, size, pieces, stop)


def _encode(line: Line) -> bytes:
    return json.dumps(line, sort_keys=True).encode() + b"\n"
