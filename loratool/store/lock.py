"""A lock on a folder that dies with its process."""

from __future__ import annotations

import os
from pathlib import Path

from loratool.errors import DiskError, OutputError
from loratool.store.disk import disk_error

try:
    import fcntl
except ImportError:  # Windows: no advisory locks on folders
    fcntl = None  # type: ignore[assignment]

_TRIES = 100  # the folder may be renamed away between making and locking it, again and again


class FolderLock:
    """An flock on a folder's inode; it stays with the folder when that is renamed.

    File systems without such locks (some network mounts) give none.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @classmethod
    def make(cls, folder: Path, output: Path) -> FolderLock:
        """Make a folder, or find it there, and lock it.

        Args:
            folder: what to lock.
            output: what the message names.

        Raises:
            OutputError: another run holds it, or something else lies in its place.
            DiskError: it cannot be made.
        """
        for _ in range(_TRIES):
            try:
                folder.mkdir(exist_ok=True)
                lock = cls.take(folder, output)
                if lock._holds(folder):
                    return lock
                lock.release()
            except (FileNotFoundError, FileExistsError):
                if folder.is_symlink() or folder.exists():
                    raise OutputError(
                        "LT-511",
                        "something else lies where the output would be made",
                        file=folder,
                        hint="move it away",
                    ) from None
                if not folder.parent.is_dir():
                    raise DiskError(
                        "LT-602", "the output's folder does not exist", file=folder.parent
                    ) from None
            except OSError as error:
                raise disk_error("cannot prepare the output", folder, error) from error
        raise _is_busy(output)

    @classmethod
    def take(cls, folder: Path, output: Path) -> FolderLock:
        """Lock a folder that exists.

        Raises:
            OutputError: another run holds it.
            OSError: it cannot be opened.
        """
        if fcntl is None:
            return cls(-1)
        try:
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except NotADirectoryError as error:
            raise FileExistsError(error.errno, error.strerror, str(folder)) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(fd)
            raise _is_busy(output) from error
        except OSError:
            pass  # no locks here
        return cls(fd)

    def _holds(self, folder: Path) -> bool:
        if self._fd < 0:
            return True
        try:
            return os.path.samestat(os.fstat(self._fd), folder.lstat())
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Let go."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _is_busy(output: Path) -> OutputError:
    return OutputError(
        "LT-503",
        "another run is writing this output",
        file=output,
        hint="wait for it, or choose another -o",
    )
