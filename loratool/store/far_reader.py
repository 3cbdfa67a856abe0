"""Reads of files that another machine has found, on storage that both see."""

from __future__ import annotations

from pathlib import Path

from loratool.adapter import Stamp
from loratool.errors import DiskError
from loratool.location import changed
from loratool.store.reader import FileReader
from loratool.store.stamps import same_content, stamp_of


class FarReader(FileReader):
    """A `FileReader` for stamps that another machine took.

    The number of a device is each machine's own, and a network's file system need not show inodes
    and ctimes alike; size and mtime are the file's.  What is found here first is then held to.
    """

    def _here(self, path: Path, stamp: Stamp) -> Stamp:
        held = self._stamps.get(path)
        found = held or stamp_of(path)
        if found is None:
            raise unseen(path)
        if not same_content(found, stamp):
            raise changed(path)
        return found


def unseen(path: Path) -> DiskError:
    """The error for what is on the driver's machine, and not here."""
    return DiskError(
        "LT-618", "a worker does not see what the run needs", file=path,
        hint="inputs and output lie where every node sees them, under the same paths",
    )  # fmt: skip
