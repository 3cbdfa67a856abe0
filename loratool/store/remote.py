"""Files that stay where they are: their bytes are read by range, from whichever place has them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, cast

from loratool.adapter import Stamp
from loratool.frozen import replace
from loratool.location import RemoteFile

_PIECE = 8 << 20


class _Place(Protocol):
    """What the Hub and an object store can do, each a module."""

    def read_range(self, file: RemoteFile, start: int, count: int) -> bytes: ...

    def check_content(self, path: Path, file: RemoteFile) -> None: ...

    def stamp_now(self, file: RemoteFile) -> Stamp | None: ...


def _place_of(file: RemoteFile) -> _Place:
    """Who has a file; nothing of either is imported before it is asked."""
    if file.is_on_hub:
        from loratool.store import hub_range

        return cast(_Place, hub_range)
    from loratool.store import store_range

    return cast(_Place, store_range)


def read_range(file: RemoteFile, start: int, count: int) -> bytes:
    """Bytes of a file, in one request unless the connection breaks.

    Raises:
        HubError: LT-750 cut short again and again, LT-751 other bytes than those asked for;
            or the place does not give the file.
        BadFileError: LT-332, it is not what it was.
        DiskError: LT-601, the store refuses.
    """
    return _place_of(file).read_range(file, start, count)


def check_content(path: Path, file: RemoteFile) -> None:
    """Refuse a fetched file that is not the listed one.

    Raises:
        HubError: LT-752.
        BadFileError: LT-332, an object that has changed since.
    """
    _place_of(file).check_content(path, file)


def stamp_now(file: RemoteFile) -> Stamp | None:
    """What a file is now; None if it is gone.

    Raises:
        HubError, DiskError: the store does not say.
    """
    return _place_of(file).stamp_now(file)


def fetch_whole(file: RemoteFile, path: Path) -> None:
    """Write a file of a folder of stubs, checked.

    Raises:
        LoratoolError: see `read_range` and `check_content`.
    """
    path.write_bytes(b"")
    append(replace(file, stub=path), path, file.size)
    check_content(path, file)


def digest_far(file: RemoteFile) -> str:
    """sha256 of a file's bytes, which are read for it."""
    found = hashlib.sha256()
    for piece in _pieces(file, 0, file.size):
        found.update(piece)
    return found.hexdigest()


def append(file: RemoteFile, path: Path, stop: int) -> None:
    """Go on with a file up to a position, never with much of it in memory."""
    with path.open("ab") as out:
        for piece in _pieces(file, out.tell(), stop):
            out.write(piece)


def _pieces(file: RemoteFile, start: int, stop: int) -> Iterator[bytes]:
    for at in range(start, stop, _PIECE):
        yield read_range(file, at, min(_PIECE, stop - at))
