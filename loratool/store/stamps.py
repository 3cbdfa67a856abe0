"""What input files are, so that a change of one during a run, or before it goes on, is noticed."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from loratool.adapter import Stamp, TensorRef
from loratool.errors import BadFileError


def stamp_from(found: os.stat_result) -> Stamp:
    """The stamp in what the system says about a file.

    The times alone would not do: who changes a file can put its mtime back, but not its ctime.
    """
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def stamp_of(path: Path) -> Stamp | None:
    """What a file is now; None if it cannot be found."""
    try:
        return stamp_from(path.stat())
    except OSError:
        return None


def same_content(one: Stamp, other: Stamp) -> bool:
    """True if stamps that two machines took may be of one file: size and mtime agree."""
    return one[2:4] == other[2:4]


def take_stamps(refs: Iterable[TensorRef]) -> dict[Path, Stamp]:
    """The stamps of all files of a plan: what they were when their headers were read.

    Raises:
        BadFileError: LT-334, a file has changed since, or is gone.
    """
    stamps = {ref.path: ref.stamp for ref in refs}
    found: dict[Path, Stamp] = {}
    for path in sorted(stamps):
        now = stamp_of(path)
        if now is None or stamps[path] not in (now, None):
            raise BadFileError(
                "LT-334", "input changed while the run was planned", file=path, hint="run it again"
            )
        found[path] = now
    return found


def check_stamp(path: Path, stamp: Stamp) -> None:
    """Refuse a file that is not what it was.

    Raises:
        BadFileError: LT-332.
    """
    if stamp_of(path) != stamp:
        raise changed(path)


def changed(path: Path) -> BadFileError:
    """The error for a file that is not what it was."""
    return BadFileError(
        "LT-332", "input changed during the run", file=path,
        hint="run it again when nothing writes to it, links it or changes its permissions",
    )  # fmt: skip
