"""Where an output may go: what is refused before anything is read or written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from loratool.errors import DiskError, LoratoolError, OutputError
from loratool.store.disk import disk_error

MARKER = "loratool.json"


def staging_path(path: Path) -> Path:
    """Where an output grows."""
    return path.with_name(path.name + ".loratool-partial")


def old_path(path: Path) -> Path:
    """Where a replaced output waits for its end, on systems that cannot swap two names."""
    return path.with_name(path.name + ".loratool-old")


def check_output(path: Path, *, is_folder: bool, force: bool) -> None:
    """Refuse an output that would destroy something or could not be written.

    That the folder can be written to is tried, not asked: permissions have many sources.

    Raises:
        OutputError: the place is taken by anything but (with ``force``) an earlier output.
        DiskError: the parent folder is missing or not writable, or the name is too long.
    """
    check_free(path, is_folder=is_folder, force=force)
    staging = staging_path(path)
    try:
        staging.mkdir()
        staging.rmdir()
    except FileExistsError:
        pass  # another run, or what is left of one: `StagedOutput` finds out
    except OSError as error:
        raise disk_error("cannot write here", staging, error) from error


def check_place(path: Path) -> None:
    """Refuse a place where no output can ever be.

    Raises:
        OutputError: no name, or a symbolic link.
        DiskError: the parent folder is missing or cannot be looked into.
    """
    if path.name in ("", ".."):
        raise OutputError("LT-510", "the output needs a name of its own", file=path)
    try:
        if not path.parent.is_dir():
            raise DiskError("LT-602", "the output's folder does not exist", file=path.parent)
        if path.is_symlink():
            to = f"link to {path.readlink()}"
            raise OutputError("LT-502", "the output is a symbolic link", file=path, got=to)
    except OSError as error:
        raise disk_error("cannot look at the output's place", path, error) from error


def check_free(
    path: Path, *, is_folder: bool, force: bool, is_own: Callable[[Path], bool] | None = None
) -> None:
    """The part of `check_output` that leaves no trace.

    Args:
        path: the output.
        is_folder: False for a single file.
        force: an earlier output may be replaced.
        is_own: tells one; None = by its marker.

    Raises:
        OutputError: the place is taken by anything but (with ``force``) an earlier output.
        DiskError: the parent folder is missing or cannot be looked into.
    """
    check_place(path)
    if not path.exists() or (is_folder and path.is_dir() and not any(path.iterdir())):
        return
    if not force:
        raise OutputError(
            "LT-501",
            "the output exists",
            file=path,
            hint="choose another -o, or --force to replace an earlier loratool output",
        )
    if path.is_dir() != is_folder or not (is_own or is_own_output)(path):
        raise OutputError(
            "LT-505",
            "--force replaces earlier loratool outputs only, and this is none",
            file=path,
            expected=f"a {MARKER} marker" if is_folder else "loratool metadata",
            hint="remove it yourself if you mean it",
        )


def is_own_output(path: Path) -> bool:
    """True if loratool wrote this folder or file (its own marker says so)."""
    if path.is_dir():
        return (path / MARKER).is_file()
    from loratool.store.header import read_header

    try:
        return "loratool" in read_header(path).metadata
    except LoratoolError:
        return False
