"""Small files from strangers, read whole under a limit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NoReturn

from loratool.errors import DiskError
from loratool.store.foreign import open_inside


def read_small(
    path: Path,
    most: int,
    too_large: Callable[[], NoReturn],
    opened: Callable[[Path], BinaryIO] = open_inside,
) -> bytes:
    """The bytes of a regular file.

    Args:
        path: the file.
        most: bytes that are accepted.
        too_large: called if there are more; it must raise.
        opened: what opens it; `loratool.store.foreign.open_regular` for a file that a user named,
            as its link may lead anywhere.

    Raises:
        BadFileError: there is no such file.
        UnsafeContentError: no regular file, or a link that leads out of its folder.
        DiskError: the system refuses to read it.
    """
    parts: list[bytes] = []
    left = most + 1
    try:
        with opened(path) as file:
            while left and (part := file.read(min(left, 1 << 20))):
                parts.append(part)
                left -= len(part)
    except OSError as error:
        raise DiskError("LT-601", "cannot read", file=path, got=error.strerror) from error
    if not left:
        too_large()
    return b"".join(parts)
