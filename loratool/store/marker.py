"""What an output says of itself: its files by size and crc32, under a seal.

`--force` replaces an earlier output, and only that: a folder or file that lists what it consists
of, whose list nobody has edited, and that holds these bytes and nothing else.  In a folder the
list is ``loratool.json``, beside the provenance; in a single tensor file it is in the ``loratool``
entry of the metadata, and speaks of the bytes after the header.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import threading
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from loratool.adapter import Stamp
from loratool.errors import LoratoolError
from loratool.frozen import Frozen
from loratool.lazy import regex
from loratool.shapes import fitting
from loratool.store.checksum import check_all, is_intact
from loratool.store.journal import is_plain_name
from loratool.store.places import INSIDE, is_mount
from loratool.store.stamps import stamp_of

MARKER = "loratool.json"
REPLACED = ".loratool-replaced"
"""Lies in an old output that gives way to a new one: empty before its name goes, its marker where
its files go one by one."""
_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)  # has such a name
_CRC = regex(r"[0-9a-f]{8}")


class Content(TypedDict):
    """Of one file: size in bytes, crc32 as eight hexadecimal digits."""

    bytes: int
    crc32: str


class _Folder(TypedDict):
    files: dict[str, Content]


class _File(TypedDict):
    data: Content


class Marker(Frozen):
    """A marker whose seal is whole.

    Attributes:
        files: name -> content of everything beside the marker; of a single file "" -> its data.
        plan: identity of what made it, None if it does not say.
    """

    files: Mapping[str, Content]
    plan: str | None = None


class Proof(Frozen):
    """What of a place is an earlier output.

    Attributes:
        stamps: file -> what it was when it was found to be one; "" -> a single file.
        strangers: what else is there, or was changed since.
        folders: those that hold or held files of the output.
    """

    stamps: Mapping[str, Stamp]
    strangers: Sequence[str] = ()
    folders: Collection[str] = ()

    def still_holds(self, path: Path) -> bool:
        """True if nothing was added or changed since."""
        found = walk(path) if path.is_dir() else {"": True}
        return found.keys() - self.stamps.keys() <= set(self.folders) and all(
            stamp_of(path / name if name else path) in (stamp, None)
            for name, stamp in self.stamps.items()
        )

    def remove(self, path: Path, *more: str) -> None:
        """Delete the files that are still what they were, and folders that become empty.

        Args:
            path: the folder, wherever it lies now.
            more: other files of it.
        """
        same = {name for name, stamp in self.stamps.items() if stamp_of(path / name) == stamp}
        remove_files(path, {*same, *more}, self.folders)


Prove = Callable[[Path], Proof]
"""Tells what of a place is an earlier output."""


def content_of(size: int, crc: int) -> Content:
    """A row of a marker."""
    return {"bytes": size, "crc32": f"{crc:08x}"}


def folder_marker(
    record: Mapping[str, Any], files: Mapping[str, Content], plan: str | None
) -> dict[str, Any]:
    """The sealed record of a folder: its provenance (if wanted), what made it, its files."""
    more = {"files": {name: files[name] for name in sorted(files.keys() - {MARKER})}}
    return _sealed({"loratool": True, **record, "plan": plan, **more})


def file_metadata(
    metadata: Mapping[str, str], data: Content, plan: str | None = None
) -> dict[str, str]:
    """Metadata of a single file with its record sealed; as long for any crc32.

    Args:
        metadata: of the file; its ``loratool`` is the record. Without one there is no marker.
        data: of the bytes after the header.
        plan: identity of what makes it; None leaves what the record says.
    """
    if "loratool" not in metadata:
        return dict(metadata)
    record = json.loads(metadata["loratool"])
    record = {**record, "data": data} if plan is None else {**record, "plan": plan, "data": data}
    return {**metadata, "loratool": json.dumps(_sealed(record))}


def read_marker(path: Path, name: str = MARKER) -> Marker | None:
    """The marker of an output, a folder or a single file; None without a whole one.

    Args:
        path: the output.
        name: of the marker in a folder.
    """
    from loratool.store.jsonfile import load_json, parse_json

    try:
        kind = path.lstat().st_mode
        if stat.S_ISREG(kind):
            said = _header_of(path)[0].get("loratool", "")
            return _marker(parse_json(said.encode(), path), "data")
        if stat.S_ISDIR(kind) and stat.S_ISREG((path / name).lstat().st_mode):
            return _marker(load_json(path / name), "files")
    except (LoratoolError, OSError):
        pass
    return None


def marker_of(data: bytes) -> Marker | None:
    """What the bytes of a folder's marker say; None if they are no whole one."""
    from loratool.store.jsonfile import parse_json

    try:
        return _marker(parse_json(data, Path(MARKER)), "files")
    except LoratoolError:
        return None


def _header_of(path: Path) -> tuple[Mapping[str, str], bytes]:
    """Metadata of a tensor file, and the bytes before its tensors."""
    from loratool.store.contained import open_inside
    from loratool.store.gguf import is_gguf, read_gguf
    from loratool.store.header import HARD_HEADER_BYTES, read_header

    if not is_gguf(path):
        header = read_header(path, max_bytes=HARD_HEADER_BYTES)
        return header.metadata, header.raw
    file = read_gguf(path)
    with open_inside(path) as raw:
        return file.texts, raw.read(file.start)


def prove(path: Path, *, deep: bool = True) -> Proof:
    """Tell what of a place an earlier run wrote; files of it may be missing by now.

    Args:
        path: folder or single file.
        deep: read every byte; False = sizes must do.

    Raises:
        OSError: it cannot be looked at.
    """
    place = MARKER if os.path.lexists(path / MARKER) else REPLACED
    marker = read_marker(path, place)
    if path.is_symlink() or not path.is_dir():
        is_own = marker is not None and _is_own_file(path, marker.files[""], deep)
        stamp = stamp_of(path)
        return Proof({"": stamp}) if is_own and stamp else Proof({}, [path.name])
    entries = walk(path)
    files = {} if marker is None else marker.files
    own = [name for name, is_file in entries.items() if is_file and name in files]
    before = {name: stamp_of(path / name) for name in own}
    good = check_all(own, lambda name, stop: _is_own(path / name, files[name], deep, stop))
    stamps = {n: s for n, ok in zip(own, good, strict=True) if ok and (s := before[n])}
    if marker is not None and (stamp := stamp_of(path / place)):
        stamps[place] = stamp
    folders = {n for n in parents_of(files) if stat.S_ISDIR(_mode(path / n))}
    return Proof(stamps, sorted(entries.keys() - stamps.keys() - folders), folders)


def _mode(path: Path) -> int:
    try:
        return path.lstat().st_mode
    except OSError:
        return 0


def remove_files(folder: Path, names: Iterable[str], folders: Iterable[str] = ()) -> None:
    """Delete files of a folder and last what proves them, and every folder that becomes empty.

    Args:
        folder: that they lie in.
        names: relative to it; what is gone is fine.
        folders: more of them to delete if they are empty.
    """
    names, last = set(names), (MARKER, REPLACED)
    for name in sorted(names.difference(last)):
        try:
            (folder / name).unlink()
        except OSError as error:
            if error.errno not in _NO_FILE:
                raise
    for name in sorted(parents_of(names).union(folders), key=len, reverse=True):
        remove_empty(folder / name)
    for name in last:
        if name in names:
            (folder / name).unlink(missing_ok=True)


def remove_empty(folder: Path) -> bool:
    """Delete a folder; False if something is in it."""
    try:
        folder.rmdir()
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.ENAMETOOLONG):
            return False
        raise
    return True


def is_whole(path: Path, plan: str) -> bool:
    """True for an output of a plan of which nothing is missing and nothing was changed."""
    marker = read_marker(path)
    if marker is None or marker.plan != plan:
        return False
    return marker.files.keys() <= prove(path).stamps.keys()


def _sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with a sha256 of everything else in it."""
    plain = {k: v for k, v in record.items() if k != "seal"}
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return {**plain, "seal": hashlib.sha256(text.encode()).hexdigest()}


def _marker(record: Mapping[str, Any], key: str) -> Marker | None:
    if record.get("seal") != _sealed(record)["seal"]:
        return None
    if key == "data":
        one = fitting(record, _File)
        files = one and {"": one["data"]}
    else:
        several = fitting(record, _Folder)
        files = several and several["files"]
    if files is None or not all(map(_is_row, files.items())):
        return None
    plan = record.get("plan")
    return Marker(files, plan if isinstance(plan, str) else None)


def _is_row(row: tuple[str, Content]) -> bool:
    name, content = row
    is_name = not name or is_plain_name(name)
    return is_name and content["bytes"] >= 0 and _CRC.fullmatch(content["crc32"]) is not None


def walk(folder: Path) -> dict[str, bool]:
    """Relative name of everything in a folder -> it is a regular file; no link is followed.

    What is under construction in a mount point is not yet part of it.
    """
    found: dict[str, bool] = {}
    hidden = INSIDE if is_mount(folder) else ""
    todo = [""]
    while todo:
        inside = todo.pop()
        with os.scandir(folder / inside) as entries:
            for entry in entries:
                name = f"{inside}/{entry.name}" if inside else entry.name
                if name == hidden:
                    continue
                found[name] = entry.is_file(follow_symlinks=False)
                if entry.is_dir(follow_symlinks=False):
                    todo.append(name)
    return found


def parents_of(names: Iterable[str]) -> set[str]:
    """Folders that files of these names lie in, relative to the same place."""
    return {"/".join(parts[:n]) for parts in (x.split("/") for x in names)
            for n in range(1, len(parts))}  # fmt: skip


def _is_own(path: Path, content: Content, deep: bool, stop: threading.Event) -> bool:
    if not deep:
        return path.lstat().st_size == content["bytes"]
    size, crc = content["bytes"], int(content["crc32"], 16)
    return is_intact(path, size, [(0, size, crc)] if size else [], stop)


def _is_own_file(path: Path, data: Content, deep: bool) -> bool:
    header = _header_of(path)[1]
    size, start = data["bytes"], len(header)
    if not deep:
        return path.lstat().st_size == start + size
    pieces = [(0, start, zlib.crc32(header))]
    pieces += [(start, size, int(data["crc32"], 16))] if size else []
    return is_intact(path, start + size, pieces, threading.Event())
