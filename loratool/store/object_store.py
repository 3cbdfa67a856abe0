"""Files of an object store, through fsspec: whole ones, by name; no rename, no writes at offsets.

Every call is tried again where that may help.  What a driver needs to know of the user (keys,
endpoints) it finds by itself, and nothing of it is asked for, shown or recorded here.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from time import sleep
from typing import Any, TypeVar

from loratool.errors import DiskError, HubError, LoratoolError, UsageError
from loratool.frozen import Frozen
from loratool.lazy import regex
from loratool.store.address import Address
from loratool.store.checksum import Piece, sum_stream, sum_whole
from loratool.store.pool import waiting_threads

T = TypeVar("T")

WAITS = (0.5, 2.0, 8.0)
"""Seconds before the second attempt, the third …"""
_REQUESTS = 8
"""Small ones at once."""
_TAGS = ("md5Hash", "ETag", "etag", "e_tag")
"""Under which drivers tell what changes with an object's content."""
_TIMES = ("mtime", "modified", "modificationTime", "last_modified", "LastModified", "created")
_MD5 = regex(r"[0-9a-f]{32}")


class Entry(Frozen):
    """An object, as the store lists it.

    Attributes:
        size: in bytes.
        tag: changes with the content; "" if the store tells none.
        time: when it was written, as the driver spells it; "" likewise.
    """

    size: int
    tag: str = ""
    time: str = ""


class ObjectStore:
    """The objects whose names begin with that of an address.

    Args:
        address: of an output; names of objects go on where it ends.

    Raises:
        UsageError: LT-296, the driver is not installed.
        HubError: LT-740, the driver refuses to start.
    """

    def __init__(self, address: Address) -> None:
        self.address = address
        self._fs, self._root = _open(address)

    def __reduce__(self) -> tuple[type[ObjectStore], tuple[Address]]:
        return ObjectStore, (self.address,)

    def at(self, name: str) -> str:
        """An object's address, for messages."""
        return f"{self.address}{name}"

    def listing(self, name: str = "") -> dict[str, Entry]:
        """What lies under a name: rest of the name -> entry; "" for an object of just this name."""
        root = self._root + name
        found: dict[str, Entry] = {}
        for path, info in self._call("cannot list", name, lambda: self._find(root)).items():
            rest = path[len(root) :] if path.startswith(root) else f"/{path}"  # a stranger's
            entry = _entry(info)
            is_folder = rest.endswith("/") and not entry.size  # as consoles make them: no content
            if rest[:1] in ("", "/") and not is_folder:  # a driver may list `out2` under `out`
                found[rest[1:]] = entry
        return found

    def _find(self, root: str) -> Mapping[str, Any]:
        self._fs.invalidate_cache()  # others write, too
        found: Mapping[str, Any] = self._fs.find(root, detail=True)
        return found

    def look(self, name: str) -> Entry | None:
        """An object; None if there is none."""
        return self._call("cannot look at", name, lambda: self._look(name))

    def _look(self, name: str) -> Entry | None:
        self._fs.invalidate_cache()
        try:
            info = self._fs.info(self._root + name)
        except FileNotFoundError:
            return None
        return _entry(info) if info["type"] == "file" else None

    def read(self, name: str) -> bytes | None:
        """A small object whole; None if there is none."""

        def read() -> bytes | None:
            try:
                data: bytes = self._fs.cat_file(self._root + name)
            except FileNotFoundError:
                return None
            return data

        return self._call("cannot read", name, read)

    def write(self, name: str, data: bytes) -> None:
        """Make a small object, or put it in the place of another."""
        self._call("cannot write", name, lambda: self._fs.pipe_file(self._root + name, data))

    def get(self, name: str, path: Path) -> None:
        """Fetch an object into a new file."""
        self._call("cannot read", name, lambda: self._fs.get_file(self._root + name, str(path)))

    def put(self, name: str, path: Path, sums: Sequence[Piece]) -> Entry:
        """Upload a file, and see that it has arrived.

        Args:
            name: of the object.
            path: of the file.
            sums: checksums of its pieces.

        Raises:
            HubError: LT-740, LT-741.
            DiskError: LT-602, LT-603.
        """
        return self._call("cannot write", name, lambda: self._put(name, path, sums))

    def _put(self, name: str, path: Path, sums: Sequence[Piece]) -> Entry:
        self._fs.put_file(str(path), self._root + name)
        size, crc = sum_whole(sums)
        found = self._look(name)
        is_good = found is not None and found.size == size
        if found and is_good and (md5 := _md5_of(found.tag)) and md5 != _md5(path):
            is_good = self._sum(name) == crc  # tags of encrypted objects look like this one
        if found is None or not is_good:
            raise _DamagedError(
                f"{size} bytes", "nothing" if found is None else f"{found.size} bytes"
            )
        return found

    def copy(self, name: str, other: str, size: int) -> None:
        """Copy an object within the store, and see that the copy is as long."""

        def copy() -> None:
            self._fs.cp_file(self._root + name, self._root + other)
            found = self._look(other)
            if found is None or found.size != size:
                raise _DamagedError(f"{size} bytes", f"{found and found.size} bytes")

        self._call("cannot copy", other, copy)

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects, in no order; what is gone already is fine."""
        self.each(names, self._delete)

    def _delete(self, name: str) -> None:
        def delete() -> None:
            try:
                self._fs.rm_file(self._root + name)
            except FileNotFoundError:
                pass

        self._call("cannot delete", name, delete)

    def each(self, names: Iterable[str], call: Callable[[str], T]) -> list[T]:
        """Do the same with several objects, which takes as long as the slowest."""
        with waiting_threads(_REQUESTS) as pool:
            return list(pool.map(call, names))

    def holds(
        self, name: str, entry: Entry | None, size: int, crc: int | None, tag: str = ""
    ) -> bool:
        """True if an object has a content; read only where no tag tells.

        Args:
            name: of the object.
            entry: as listed now, None if it is not there.
            size: of the content in bytes.
            crc: crc32 of the content; None = its size must do.
            tag: what the object had when it had this content.
        """
        if entry is None or entry.size != size:
            return False
        if crc is None or (tag and entry.tag):
            return crc is None or tag == entry.tag
        return self._call("cannot read", name, lambda: self._sum(name)) == crc

    def _sum(self, name: str) -> int:
        with self._fs.open(self._root + name, "rb") as file:
            return sum_whole(sum_stream(file))[1]

    def _call(self, what: str, name: str, call: Callable[[], T]) -> T:
        """Try a few times; what a driver raises becomes one of our errors."""
        for wait in (*WAITS, None):
            try:
                return call()
            except Exception as error:
                if wait is None or _is_final(error):
                    raise self._refusal(what, name, error) from error
                sleep(wait)
        raise AssertionError

    def _refusal(self, what: str, name: str, error: Exception) -> LoratoolError:
        if isinstance(error, LoratoolError):
            return error
        got = str(error).strip().partition("\n")[0] or type(error).__name__
        if isinstance(error, PermissionError) or _lacks_keys(error):
            return DiskError(
                "LT-603", "no permission to write here", file=self.at(name), got=got,
                hint=f"the {self.address.scheme} driver takes keys from its own variables or files",
            )  # fmt: skip
        if isinstance(error, FileNotFoundError) and what in ("cannot list", "cannot write"):
            return DiskError("LT-602", "the output's folder does not exist",
                             file=self.at(name), got=got, hint="make the bucket first")  # fmt: skip
        if isinstance(error, _DamagedError):
            return HubError(
                "LT-741", "the object store does not hold what was sent", file=self.at(name),
                expected=error.expected, got=error.got, hint="try again",
            )  # fmt: skip
        return HubError("LT-740", f"{what} in the object store", file=self.at(name), got=got,
                        hint="check the address and the network, and try again")  # fmt: skip


class _DamagedError(Exception):
    """What arrived is not what was sent."""

    def __init__(self, expected: str, got: str) -> None:
        super().__init__(expected, got)
        self.expected, self.got = expected, got


def _open(address: Address) -> tuple[Any, str]:
    """A driver, and the name by which it knows an address."""
    import fsspec
    from fsspec.registry import known_implementations

    try:
        driver, root = fsspec.url_to_fs(str(address))
    except ImportError as error:
        home = known_implementations.get(address.scheme, {}).get("class", address.scheme)
        raise UsageError(
            "LT-296", f"{address.scheme}:// needs a driver", file=address, got=str(error),
            hint=f"pip install {home.partition('.')[0]}",
        ) from error  # fmt: skip
    except Exception as error:
        raise HubError(
            "LT-740", "cannot start in the object store", file=address,
            got=str(error) or type(error).__name__,
            hint="check the address and the driver's own settings",
        ) from error  # fmt: skip
    return driver, str(root)


def _entry(info: Mapping[str, Any]) -> Entry:
    tag, time = (next((str(info[key]) for key in keys if info.get(key)), "")
                 for keys in (_TAGS, _TIMES))  # fmt: skip
    return Entry(int(info["size"] or 0), tag.strip('"'), time)


def _md5_of(tag: str) -> bytes | None:
    """The md5 that a tag is: in hexadecimal (S3, one part) or base64 (Google); else None."""
    if _MD5.fullmatch(tag):
        return bytes.fromhex(tag)
    return base64.b64decode(tag) if len(tag) == 24 and tag.endswith("==") else None


def _md5(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).digest()


def _lacks_keys(error: Exception) -> bool:
    return "Credential" in type(error).__name__


def _is_final(error: Exception) -> bool:
    """True where asking again is of no use."""
    final = (PermissionError, FileNotFoundError, NotImplementedError, TypeError, LoratoolError)
    return isinstance(error, final) or _lacks_keys(error)
