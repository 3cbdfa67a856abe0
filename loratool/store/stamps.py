"""What input files are, so that a change of one during a run, or before it goes on, is noticed."""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import starmap

from loratool.adapter import Stamp, TensorRef
from loratool.errors import BadFileError
from loratool.location import Location, RemoteFile, changed
from loratool.store.stubs import known_as


def stamp_from(found: os.stat_result) -> Stamp:
    """The stamp in what the system says about a file.

    The times alone would not do: who changes a file can put its mtime back, but not its ctime.
    """
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def stamp_of(path: Location) -> Stamp | None:
    """What a file is now; None if it cannot be found.

    Raises:
        HubError, DiskError: an object store does not say.
    """
    if isinstance(path, RemoteFile):
        from loratool.store.remote import stamp_now

        return stamp_now(path)
    try:
        return stamp_from(path.stat())
    except OSError:
        return None


def same_content(one: Stamp, other: Stamp) -> bool:
    """True if stamps that two machines took may be of one file: size and mtime agree."""
    return one[2:4] == other[2:4]


def stamp_in(ref: TensorRef) -> tuple[Location, Stamp | None]:
    """The file of a tensor, and what it was when its header was read."""
    return ref.file, ref.file.stamp if isinstance(ref.file, RemoteFile) else ref.stamp


def known_stamp(file: Location, stamp: Stamp | None) -> tuple[Location, Stamp | None]:
    """A file by the name that it has in other runs, too; of one that was fetched its source's."""
    place = known_as(file)
    return place, place.stamp if isinstance(place, RemoteFile) else stamp


def take_stamps(refs: Iterable[TensorRef]) -> dict[Location, Stamp]:
    """The stamps of all files of a plan: what they were when their headers were read.

    Raises:
        BadFileError: LT-334, a file has changed since, or is gone.
    """
    stamps = dict(starmap(known_stamp, dict(map(stamp_in, refs)).items()))
    found: dict[Location, Stamp] = {}
    for path in sorted(stamps, key=str):
        now = stamp_of(path)
        if now is None or stamps[path] not in (now, None):
            raise BadFileError(
                "LT-334", "input changed while the run was planned", file=path, hint="run it again"
            )
        found[path] = now
    return found


def check_stamp(path: Location, stamp: Stamp) -> None:
    """Refuse a file that is not what it was.

    Raises:
        BadFileError: LT-332.
    """
    if stamp_of(path) != stamp:
        raise changed(path)
