"""What an interrupted run has begun and finished: one JSON object a line.

The first line names the plan and the inputs as they were.  A line with ``names`` says which files
the run is about to make: nothing else in the folder is its own.  A line with ``file`` names one
that is complete, its size and the checksums of its pieces, and is on the disk before the next; one
with ``dropped`` takes that back.
Every line begins with its own crc32: one that is torn or damaged does not count.
"""

from __future__ import annotations

import json
import os
import stat
import threading
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypedDict

from loratool.shapes import fitting
from loratool.store.checksum import check_all, is_intact
from loratool.store.disk import sync_folder, write_all, write_synced

NAME = ".journal"
TEMPORARY = f"{NAME}.tmp"
NAME_MAX = 255  # bytes; no file system in use has longer names
Line = Mapping[str, Any]


class Head(TypedDict):
    """The first line."""

    loratool: str
    plan: str | None
    inputs: dict[str, list[int]]


class Names(TypedDict):
    """Files that are about to be made."""

    names: list[str]


class Dropped(TypedDict):
    """Files that were complete and are no part of the output."""

    dropped: list[str]


class Finished(TypedDict):
    """A complete file."""

    file: str
    size: int
    crc32: list[tuple[int, int, int]]
    results: Any


class Earlier(NamedTuple):
    """What the journal of an earlier run says.

    Attributes:
        exists: there is one: what it names in its folder is loratool's.
        plan: identity of what that run makes; None if it cannot be gone on with.
        inputs: the stamps of its inputs.
        names: every file that it has made or was about to make.
        finished: file -> line of those that are complete.
    """

    exists: bool
    plan: str | None
    inputs: Mapping[str, list[int]]
    names: frozenset[str]
    finished: Mapping[str, Finished]


class Journal:
    """The journal of a staging folder.

    Args:
        folder: the staging folder.
        lines: what it starts with: the head, then names and the files that are complete already.
    """

    def __init__(self, folder: Path, lines: Iterable[Line]) -> None:
        self._lock = threading.Lock()
        path, new = folder / NAME, folder / TEMPORARY
        new.unlink(missing_ok=True)
        write_synced(new, b"".join(encode(line) for line in lines))
        new.replace(path)
        sync_folder(folder)
        self._file: BinaryIO = path.open("ab", buffering=0)

    def append(self, line: Line) -> None:
        """Add a line and wait until it is on the disk."""
        with self._lock:
            write_all(self._file.fileno(), encode(line))
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close; the file stays."""
        self._file.close()


def read_journal(folder: Path) -> Earlier:
    """Read a staging folder's journal, as far as it is undamaged."""
    heads: list[Head] = []
    names: set[str] = set()
    finished: dict[str, Finished] = {}
    for line in read_lines(folder / NAME):
        if "file" in line:
            one = fitting(line, Finished)
            if one is not None and _may_be_made(one["file"]):
                finished[one["file"]] = one
        elif "dropped" in line:
            for name in (fitting(line, Dropped) or {"dropped": []})["dropped"]:
                finished.pop(name, None)
        elif "names" in line:
            names.update(filter(_may_be_made, (fitting(line, Names) or {"names": []})["names"]))
        else:
            head = fitting(line, Head)
            heads += [] if head is None else [head]
    exists = bool(heads or names or finished)
    plan = heads[0]["plan"] if heads else None
    inputs = heads[0]["inputs"] if heads else {}
    return Earlier(exists, plan, inputs, frozenset(names | finished.keys()), finished)


def intact_files(folder: Path, lines: Mapping[str, Finished]) -> dict[str, Finished]:
    """File -> line of the files whose bytes are still what the journal says."""
    found = check_all(
        list(lines.items()),
        lambda item, stop: (
            _is_file(folder / item[0])
            and is_intact(folder / item[0], item[1]["size"], item[1]["crc32"], stop)
        ),
    )
    return {name: line for (name, line), good in zip(lines.items(), found, strict=True) if good}


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def _may_be_made(name: str) -> bool:
    """True for a name that a file beside the journal may have."""
    return is_plain_name(name) and name.partition("/")[0] not in (NAME, TEMPORARY)


def is_plain_name(name: str) -> bool:
    """True for a path with forward slashes that stays in the folder it is relative to."""
    try:
        parts = os.fsencode(name).split(b"/")
    except UnicodeEncodeError:  # half of a surrogate pair that stands for no byte
        return False
    bad = "\0" if os.sep == "/" else "\0\\:"  # Windows: another way down, and another disk
    longest = max(map(len, parts))
    is_inside = not {b"", b".", b".."} & set(parts)
    return is_inside and longest <= NAME_MAX and not set(bad) & set(name)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The undamaged lines of a file; none if there is no such file, or only a link."""
    try:
        raw = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
    except FileNotFoundError:
        return []
    return lines_of(raw)


def lines_of(raw: bytes) -> list[dict[str, Any]]:
    """The undamaged lines of what `encode` made."""
    found = []
    for text in raw.split(b"\n"):
        crc, _, body = text.partition(b" ")
        if crc != _sum(body):
            continue
        try:
            value = json.loads(body)
        except (ValueError, RecursionError):
            continue
        found += [value] if isinstance(value, dict) else []
    return found


def encode(line: Line) -> bytes:
    """A line as it is written."""
    body = json.dumps(line, sort_keys=True).encode()
    return _sum(body) + b" " + body + b"\n"


def is_torn_start(raw: bytes) -> bool:
    """True for what a kill can leave of a journal's first line."""
    crc, rest = raw[:8], raw[8:20]
    return not crc.strip(b"0123456789abcdef") and b' {"inputs": '.startswith(rest)


def _sum(body: bytes) -> bytes:
    return b"%08x" % zlib.crc32(body)
