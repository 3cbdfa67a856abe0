"""Names of an output and beside it: where it grows, and where a replaced one waits for its end."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from loratool.errors import OutputError
from loratool.lazy import regex
from loratool.store.disk import disk_error

INSIDE = ".loratool-partial"
_OCTAL = regex(rb"\\([0-7]{3})")


def staging_path(path: Path) -> Path:
    """Where an output grows: beside its place, or inside of a mount point."""
    return path / INSIDE if is_mount(path) else path.with_name(path.name + INSIDE)


def old_path(path: Path) -> Path:
    """Where a replaced output waits for its end, on systems that cannot swap two names."""
    return path.with_name(path.name + ".loratool-old")


def notes_path(path: Path) -> Path:
    """Where a series of outputs that begins with this one keeps its notes.

    Raises:
        LoratoolError: see `check_name`.
    """
    check_name(path)
    return path.with_name(f"{path.name}.loratool-run")


def is_mount(path: Path) -> bool:
    """True for a folder on which something is mounted: it can be filled but not renamed."""
    if path.is_symlink() or not path.is_dir():
        return False
    return os.path.ismount(path) or os.fsencode(os.path.realpath(path)) in _mounts()


def _mounts() -> list[bytes]:
    """Of Linux; a folder mounted within its own file system shows nowhere else."""
    if sys.platform != "linux":
        return []
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return []
    places = (line.split(b" ")[4] for line in lines if line.count(b" ") > 4)
    return [_OCTAL.sub(lambda m: bytes([int(m[1], 8)]), place) for place in places]


def check_name(path: Path) -> None:
    """Refuse a name that no output can have.

    Raises:
        OutputError: no name, that of a stream, or the current folder.
        DiskError: it cannot be looked at.
    """
    if str(path) == "-":
        raise OutputError(
            "LT-510", "outputs are files and folders: none is written to a stream", file=path,
            hint="give a name; with --json the report goes to stdout",
        )  # fmt: skip
    if path.name in ("", ".."):
        raise OutputError(
            "LT-510", "the output needs a name of its own", file=path, got=repr(str(path)),
            hint="give it a name that is free",
        )  # fmt: skip
    try:
        is_here = path.is_dir() and _is_current(path)
    except OSError as error:
        raise disk_error("cannot look at the output's place", path, error) from error
    if is_here:
        raise OutputError(
            "LT-512", "the output is the folder that you are in", file=path,
            hint="choose another -o, or leave the folder first: cd ..",
        )  # fmt: skip


def _is_current(path: Path) -> bool:
    """True for the working folder and what it lies in: it would go away under the user's feet."""
    try:
        here = Path.cwd()
    except OSError:  # it is gone already
        return False
    return any(folder.samefile(path) for folder in (here, *here.parents))
