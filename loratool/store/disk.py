"""What the file system is asked for, in portable steps, and its refusals in our words."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loratool.errors import DiskError, LoratoolError
from loratool.store.contained import open_inside
from loratool.store.reader import plain_io

_AT_FDCWD = -100  # <linux/fcntl.h>: paths are relative to the working folder
_NO_REPLACE, _EXCHANGE = 1, 2  # <linux/fs.h>


def create_new(path: Path, flags: int = os.O_WRONLY) -> int:
    """Open a file that must not exist yet, not even as a link; mode 0666 less the umask."""
    more = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    return os.open(path, flags | os.O_CREAT | os.O_EXCL | more, 0o666)


def write_synced(path: Path, *data: bytes | memoryview) -> None:
    """Write a new file, one part after the other, and wait until it is on the disk."""
    fd = create_new(path)
    try:
        for part in data:
            write_all(fd, part)
        os.fsync(fd)
    finally:
        os.close(fd)


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write all of the data, however little the system takes at a time."""
    view = memoryview(data)
    while view:
        view = view[progress(os.write(fd, view)) :]


def copy_synced(source: Path, path: Path) -> None:
    """Copy into a new file, in pieces, and wait until it is on the disk."""
    from shutil import copyfileobj

    with open_inside(source) as file, os.fdopen(create_new(path), "wb") as copy:
        copyfileobj(file, copy, 1 << 20)
        copy.flush()
        os.fsync(copy.fileno())


def progress(wrote: int) -> int:
    """The count of a write, which must not be none at all (or a loop would never end)."""
    if wrote <= 0:
        raise OSError(errno.EIO, "nothing could be written")
    return wrote


def sync_folder(path: Path) -> None:
    """Make renames inside a folder durable (a no-op where folders cannot be synced)."""
    if os.name != "posix":
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def rename_new(source: Path, target: Path) -> None:
    """Rename a file to a name that must be free.

    Raises:
        FileExistsError: it is not.
    """
    if _renameat2(source, target, _NO_REPLACE):
        return
    try:
        os.link(source, target, follow_symlinks=False)
    except FileExistsError:
        raise
    except (OSError, NotImplementedError):  # a file system without hard links
        if target.is_symlink() or target.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
        source.rename(target)
    else:
        source.unlink()


def exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where the system cannot."""
    return _renameat2(one, other, _EXCHANGE)


def _renameat2(source: Path, target: Path, flags: int) -> bool:
    """The Linux call behind both; False where it is missing."""
    if plain_io() or sys.platform != "linux":
        return False
    import ctypes

    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:  # a C library without it
        return False
    if call(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flags) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(target))


def remove(path: Path) -> None:
    """Delete a file, a link or a whole folder; what is gone already is fine."""
    if path.is_dir() and not path.is_symlink():
        from shutil import rmtree

        rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def lies_in_memory(path: Path) -> bool:
    """True for a file system in memory (Linux): it lets one thread at a time write into a file."""
    try:
        device = path.stat().st_dev
        mounts = Path("/proc/self/mountinfo").read_text("utf-8", "surrogateescape").splitlines()
    except (OSError, AttributeError):
        return False
    known = (line.split() for line in mounts)
    number = f"{os.major(device)}:{os.minor(device)}"
    return any(m[2] == number and m[m.index("-") + 1] in ("tmpfs", "ramfs") for m in known)


def check_space(folder: Path, need: int) -> None:
    """Refuse work that cannot fit on the disk.

    Args:
        folder: where it will be written.
        need: bytes still to be written.

    Raises:
        DiskError: fewer bytes are free than 1.02 times the need.
    """
    free, need = _free_bytes(folder), need * 51 // 50
    if free < need:
        raise DiskError(
            "LT-610",
            "not enough free disk space",
            file=folder.parent,
            expected=f"{need:,} bytes",
            got=f"{free:,} bytes free",
            hint=f"free {(need - free) / 1e6:,.1f} MB, or choose an -o on another disk",
        )


def _free_bytes(folder: Path) -> int:
    if hasattr(os, "statvfs"):
        found = os.statvfs(folder)
        return found.f_bavail * found.f_frsize
    from shutil import disk_usage

    return disk_usage(folder).free


@contextmanager
def refusals_as(what: str, path: Path) -> Iterator[None]:
    """Turn a refusal of the system inside the block into a `disk_error`."""
    try:
        yield
    except OSError as error:
        raise disk_error(what, path, error) from error


def disk_error(what: str, path: Path, error: OSError) -> LoratoolError:
    """A refusal of the system, in our words, with what can be done about it."""
    got = error.strerror or str(error)
    number = error.errno
    if number == errno.ENOSPC:
        return DiskError("LT-611", f"{what}: the disk is full", file=path, got=got,
                         hint="free some space")  # fmt: skip
    if number == getattr(errno, "EDQUOT", None):
        return DiskError("LT-612", f"{what}: the disk quota is used up", file=path, got=got,
                         hint="free some space, or ask for a larger quota")  # fmt: skip
    if number == errno.EFBIG:
        return DiskError("LT-613", f"{what}: the file system or a limit forbids so large a file",
                         file=path, got=got,
                         hint="--shard-size 2GB makes smaller files (see ulimit -f)")  # fmt: skip
    if number == errno.EIO:
        return DiskError("LT-614", f"{what}: the disk or its connection failed", file=path,
                         got=got, hint="check the disk before anything else")  # fmt: skip
    if number == errno.ENAMETOOLONG:
        shown = str(path)
        return DiskError(
            "LT-615", f"{what}: the name is too long", got=f"{len(shown)} characters",
            file=shown if len(shown) <= 120 else f"{shown[:80]}…{shown[-30:]}",
            hint="choose a shorter -o",
        )  # fmt: skip
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return DiskError("LT-603", "no permission to write here", file=path, got=got)
    return DiskError("LT-604", what, file=path, got=got)
