"""Folders of this machine for files on their way into an object store."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from loratool.errors import OutputError
from loratool.store.disk import disk_error
from loratool.store.lock import FolderLock

_NAME = "loratool-spool-"


class Spool:
    """A temporary folder that is gone at the end of the block; ``TMPDIR`` says on which disk.

    What killed runs left is deleted first: folders of this name and user that nobody has locked.

    Attributes:
        path: the folder.
    """

    def __init__(self) -> None:
        top = Path(tempfile.gettempdir())
        try:
            _sweep(top)
            self.path = Path(tempfile.mkdtemp(prefix=_NAME, dir=top))
            self._lock = FolderLock.make(self.path, self.path)
        except OSError as error:
            raise disk_error("cannot make a temporary folder", top, error) from error

    def close(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.release()

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _sweep(top: Path) -> None:
    if not hasattr(os, "getuid"):  # no locks either: nobody knows whose is alive
        return
    for left in top.glob(f"{_NAME}*"):
        try:
            if left.lstat().st_uid != os.getuid() or left.is_symlink():
                continue
            with FolderLock.take(left, left):
                shutil.rmtree(left, ignore_errors=True)
        except (OSError, OutputError):  # gone meanwhile, or in use
            continue
