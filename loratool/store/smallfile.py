"""Small files from strangers, read whole under a limit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from loratool.errors import DiskError
from loratool.store.contained import open_inside


def read_small(
    path: Path,
    most: int,
    too_large: Callable[[], NoReturn],
    folder: Path | None = None,
) -> bytes:
    """The bytes of a regular file.

    Args:
        path: the file.
        most: bytes that are accepted.
        too_large: called if there are more; it must raise.
        folder: what it belongs to (`loratool.store.contained`); None = the folder it lies in.

    Raises:
        BadFileError: there is no such file.
        UnsafeContentError: no regular file, or a link that leads out of its folder.
        DiskError: the system refuses to read it.
    """
    parts: list[bytes] = []
    left = most + 1
    try:
        with open_inside(path, folder) as file:
            while left and (part := file.read(min(left, 1 << 20))):
                parts.append(part)
                left -= len(part)
    except OSError as error:
        raise DiskError("LT-601", "cannot read", file=path, got=error.strerror) from error
    if not left:
        too_large()
    return b"".join(parts)
