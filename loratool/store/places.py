"""Names beside an output: where it grows, and where a replaced one waits for its end."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

INSIDE = ".loratool-partial"
_OCTAL = re.compile(rb"\\([0-7]{3})")


def staging_path(path: Path) -> Path:
    """Where an output grows: beside its place, or inside of a mount point."""
    return path / INSIDE if is_mount(path) else path.with_name(path.name + INSIDE)


def old_path(path: Path) -> Path:
    """Where a replaced output waits for its end, on systems that cannot swap two names."""
    return path.with_name(path.name + ".loratool-old")


def is_mount(path: Path) -> bool:
    """True for a folder on which something is mounted: it can be filled but not renamed."""
    if path.is_symlink() or not path.is_dir():
        return False
    return path.is_mount() or os.fsencode(os.path.realpath(path)) in _mounts()


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
