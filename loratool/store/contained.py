"""Which files may be opened: one decision for every command.

What belongs to a folder lies in it.  A link, or a name in a record, an index or a configuration,
that leads out of the folder is refused: it could bring any file of this machine into an output.
Only the layout of the Hub's cache is known, ``models--owner--name/snapshots/<commit>/file ->
../../blobs/<hash>``, and of it the blobs of the same repository; such a blob may in turn be a link
into the store that repositories share, ``blobs/<hash[:2]>/<hash>`` beside them.  A link that the
user typed is the user's: see `typed`.
"""

from __future__ import annotations

import errno
import os
import re
import shlex
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import NoReturn

from loratool.adapter import Stamp
from loratool.errors import BadFileError, DiskError, UnsafeContentError
from loratool.lazy import regex
from loratool.store.stamps import stamp_from
from loratool.store.stubs import bring

# O_NONBLOCK: if the file is exchanged for a FIFO right now, opening must not hang.
_READ = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
_FOLDER = getattr(os, "O_PATH", os.O_RDONLY) | getattr(os, "O_DIRECTORY", 0)
_MOST_LINKS = 40  # as systems follow in a row
_BLOB = regex(r"[0-9a-f]{64}")
_IN_STEPS = {os.open, os.stat} <= os.supports_dir_fd
_KINDS = {
    stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket",
    stat.S_IFLNK: "a link",
}  # fmt: skip


def open_inside(path: Path, folder: Path | None = None, *, shown: object = None) -> FileIO:
    """Open a regular file that belongs to a folder; anything else is refused without being opened.

    Args:
        path: the file.
        folder: what it belongs to; None = the folder it lies in.
        shown: its name for messages; None = the path.

    Raises:
        BadFileError: LT-300, there is no such file, or the link is broken.
        UnsafeContentError: LT-901, a folder, FIFO, socket or device; LT-904, it lies elsewhere.
        DiskError: no permission, or an input/output error.
        HubError: it is a small file on the Hub, which does not give it.
    """
    shown = path if shown is None else shown
    bring(path)
    with _refusals(path, shown):
        top, inner = _place(path, folder or path.parent, shown)
        return _open_below(top, inner, shown)


def open_again(path: Path) -> FileIO:
    """Open a file that was found inside its folder before, and is held to what it was then.

    Raises:
        BadFileError: LT-300, it is gone.
        UnsafeContentError: LT-901, it is no regular file any more.
        DiskError: no permission, or an input/output error.
    """
    with _refusals(path, path):
        _require_regular(path.stat().st_mode, path)
        return _checked(os.open(path, _READ), path)


def read_small(
    path: Path,
    most: int,
    too_large: Callable[[], NoReturn],
    folder: Path | None = None,
) -> bytes:
    """The bytes of a small file from a stranger, read whole under a limit.

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


def find_inside(path: Path, folder: Path) -> tuple[Path, Stamp]:
    """Where a file that belongs to a folder really lies, and what it is now; not opened.

    Raises:
        UnsafeContentError: LT-901, no regular file, or a broken link; LT-904, it lies elsewhere.
        DiskError: no permission, or an input/output error.
    """
    try:
        with _refusals(path, path):
            top, inner = _place(path, folder, path)
            real = top.joinpath(*inner)
            return real, stamp_from(real.lstat())
    except BadFileError as error:
        raise UnsafeContentError(
            "LT-901", "not a regular file", file=path, expected="a file", got="a broken link"
        ) from error


def list_folder(folder: Path, root: Path | None = None) -> list[Path]:
    """What lies in a folder, sorted.

    Args:
        folder: it may be a link.
        root: the folder that it belongs to; None = the user typed it.

    Raises:
        UnsafeContentError: LT-904, it is a link that leads out of ``root``.
        DiskError: LT-601, the system refuses to list it.
    """
    with _refusals(folder, folder):
        if root is not None and not is_inside(folder, root):
            _refuse_link(folder, Path(os.path.realpath(folder)), root)
        return sorted(folder.iterdir())


def is_inside(path: Path, folder: Path) -> bool:
    """True if a file or folder belongs to a folder, wherever links on the way lead."""
    top = Path(os.path.realpath(folder))
    return Path(os.path.realpath(path)) == top or _home_of(path, top) is not None


def typed(path: Path) -> Path:
    """A file as the user typed it: a link out of its folder stands for the file that it leads to.

    So the neighbours that count, such as its configuration, are those of the real file.
    """
    for _ in range(_MOST_LINKS):
        if not path.is_symlink() or path.is_dir() or is_inside(path, path.parent):
            break
        path = path.parent / path.readlink()
    return path


def check_name(name: str, source: Path, what: str) -> str:
    """A file name from a record or an index, if it cannot lead out of a folder.

    Raises:
        UnsafeContentError: LT-902, absolute, with ``..``, a drive letter, a backslash or a NUL.
    """
    parts = name.split("/")
    if (
        any(part in ("", ".", "..") for part in parts)
        or any(c in name for c in "\\\0")
        or re.match(r"[A-Za-z]:", name)
    ):
        raise UnsafeContentError(
            "LT-902", f"{what} names a file outside its folder", file=source,
            expected="a plain file name", got=ascii(name[:200]),
        )  # fmt: skip
    return name


def _place(path: Path, folder: Path, shown: object) -> tuple[Path, tuple[str, ...]]:
    """A folder without links, and the way from it to the file, without links too."""
    _require_regular(path.stat().st_mode, shown)
    real = Path(os.path.realpath(path))
    home = _home_of(path, Path(os.path.realpath(folder)))
    if home is None:
        _refuse_link(shown, real, folder)
    return home, real.relative_to(home).parts


def _home_of(path: Path, top: Path) -> Path | None:
    """The folder that vouches for a file: the one it belongs to, or one of the Hub's cache."""
    real = Path(os.path.realpath(path))
    if real != top and real.is_relative_to(top):
        return top
    for commit in (top, *top.parents):
        snapshots, repo = commit.parent, commit.parent.parent
        if snapshots.name == "snapshots" and repo.name.startswith("models--"):
            blobs, store = repo / "blobs", repo.parent / "blobs" / real.name[:2]
            is_shared = real.parent == store and _BLOB.fullmatch(real.name) is not None
            if real.parent == blobs or (is_shared and link_target(path).parent == blobs):
                return real.parent
    return None


def link_target(path: Path) -> Path:
    """Where a link leads in one step, in a folder without links; of a file the file itself."""
    target = path.parent / path.readlink() if path.is_symlink() else path
    return Path(os.path.realpath(target.parent)) / target.name


def _open_below(top: Path, inner: tuple[str, ...], shown: object) -> FileIO:
    """Go down step by step, so that a link made meanwhile is not followed either."""
    if not _IN_STEPS:
        return _checked(os.open(top.joinpath(*inner), _READ | _NO_LINK), shown)
    at = os.open(top, _FOLDER)
    try:
        for name in inner[:-1]:
            below = os.open(name, _FOLDER | _NO_LINK, dir_fd=at)
            os.close(at)
            at = below
        _require_regular(os.stat(inner[-1], dir_fd=at, follow_symlinks=False).st_mode, shown)
        return _checked(os.open(inner[-1], _READ | _NO_LINK, dir_fd=at), shown)
    finally:
        os.close(at)


def _checked(fd: int, shown: object) -> FileIO:
    file = os.fdopen(fd, "rb", buffering=0)
    try:
        _require_regular(os.fstat(fd).st_mode, shown)
    except UnsafeContentError:
        file.close()
        raise
    return file


@contextmanager
def _refusals(path: Path, shown: object) -> Iterator[None]:
    """What the system refuses inside the block, in our words."""
    try:
        yield
    except FileNotFoundError as error:
        what = "broken symbolic link" if path.is_symlink() else "no such file"
        raise BadFileError("LT-300", what, file=shown) from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        if getattr(error, "errno", None) == errno.ELOOP:
            raise UnsafeContentError(
                "LT-901", "not a regular file", file=shown, expected="a file",
                got="links in a circle",
            ) from error  # fmt: skip
        got = getattr(error, "strerror", None) or str(error)
        raise DiskError("LT-601", "cannot read", file=shown, got=got) from error


def _refuse_link(shown: object, real: Path, folder: Path) -> NoReturn:
    top = folder if folder.name not in ("", "..") else Path(os.path.realpath(folder))
    words = ["cp", "-RL", str(top), str(top.with_name(f"{top.name}-copy"))]
    raise UnsafeContentError(
        "LT-904", "a link leads out of its folder, so the file is not used", file=shown, got=real,
        hint="name the folder where the files really are; or, if you trust what the links lead "
        f"to, copy it: {shlex.join(words)}",
    )  # fmt: skip


def _require_regular(mode: int, shown: object) -> None:
    if not stat.S_ISREG(mode):
        raise UnsafeContentError(
            "LT-901", "not a regular file", file=shown,
            expected="a file", got=_KINDS.get(stat.S_IFMT(mode), "a device"),
        )  # fmt: skip
