"""Stand-ins on this machine for files that stay on the Hub or in an object store.

A stub holds its file's header and little more.  It is short, never sparse: code that reads tensor
bytes past `loratool.store.remote` fails instead of finding zeros.  What the stubs of a folder stand
for is written beside them, so that whoever has a path knows.  Nothing of either place is imported
before there is something to fetch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from msgspec import to_builtins

from loratool.errors import STUBS
from loratool.frozen import Frozen, replace
from loratool.location import Location, RemoteFile
from loratool.shapes import fitting_json

_MANIFEST = "stubs.json"


def make_stub_folder() -> Path:
    """A temporary folder for stubs, and for the list of what they stand for."""
    import tempfile

    return Path(tempfile.mkdtemp(prefix=STUBS)).resolve()


def list_stubs(
    top: Path, stubs: Mapping[Path, RemoteFile], late: Mapping[Path, RemoteFile]
) -> None:
    """Write down what the files in a folder of stubs stand for.

    Args:
        top: of `make_stub_folder`.
        stubs: read by range.
        late: files that are fetched whole when somebody opens them, at the latest.
    """
    rows = {
        path.relative_to(top).as_posix(): to_builtins(_Row(is_late, replace(file, stub=None)))
        for is_late, files in ((False, stubs), (True, late))
        for path, file in files.items()
    }
    (top / _MANIFEST).write_text(json.dumps(rows))


class _Row(Frozen):
    """What a path in a folder of stubs stands for."""

    is_late: bool
    file: RemoteFile


def remote_file(path: Path) -> RemoteFile | None:
    """What a stub stands for; None for a file of this machine."""
    row = _row_of(path)
    return None if row is None or row.is_late else replace(row.file, stub=path)


def known_as(file: Location) -> Location:
    """A file, or what one in a folder of stubs was fetched from: its name in other runs, too."""
    row = _row_of(file) if isinstance(file, Path) else None
    return file if row is None else row.file


def bring(path: Path, *, whole: bool = False) -> bool:
    """Fetch a file that has only been named so far; False for any other.

    Args:
        path: of any file.
        whole: also one that is read by range, to be copied.
    """
    row = _row_of(path)
    if row is None or not (row.is_late or whole) or path.stat().st_size == row.file.size:
        return False
    from loratool.store.remote import fetch_whole

    fetch_whole(row.file, path)
    return True


def _row_of(path: Path) -> _Row | None:
    top = next((p for p in path.parents if p.name.startswith(STUBS)), None)
    if top is None or not _is_own(top):
        return None
    rows = fitting_json((top / _MANIFEST).read_bytes(), dict[str, _Row])
    return (rows or {}).get(path.relative_to(top).as_posix())


def _is_own(top: Path) -> bool:
    """A folder that `make_stub_folder` made: what a user is given may bear any name."""
    import tempfile

    if top.parent != Path(tempfile.gettempdir()).resolve() or not (top / _MANIFEST).is_file():
        return False
    return not hasattr(os, "getuid") or top.stat().st_uid == os.getuid()
