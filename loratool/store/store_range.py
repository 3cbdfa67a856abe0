"""Inputs in an object store: what lies there, and bytes of it by range."""

from __future__ import annotations

from pathlib import Path

from loratool.adapter import Stamp
from loratool.errors import BadFileError, DiskError, HubError, LoratoolError
from loratool.location import RemoteFile, changed
from loratool.store.address import Address
from loratool.store.object_store import Entry, ObjectStore


class InputStore(ObjectStore):
    """An `ObjectStore` that is read: what it refuses is said of inputs."""

    def range(self, name: str, start: int, count: int) -> bytes:
        """Bytes of an object.

        Raises:
            HubError: LT-750 cut short again and again, LT-751 other bytes than those asked for.
            LoratoolError: of `_refusal`.
        """

        def read() -> bytes:
            data: bytes = self._fs.cat_file(self._root + name, start=start, end=start + count)
            if len(data) < count:
                raise _ShortError(f"{count} bytes at {start}", f"{len(data)} bytes")
            return data

        data = self._call("cannot read", name, read)
        if len(data) > count:
            raise HubError(
                "LT-751", "the server does not send the bytes asked for", file=self.at(name),
                expected=f"{count} bytes at {start}", got=f"{len(data)} bytes",
                hint="this store knows no ranges: fetch the file with its own program",
            )  # fmt: skip
        return data

    def _refusal(self, what: str, name: str, error: Exception) -> LoratoolError:
        found = super()._refusal(what, name, error)
        if isinstance(error, _ShortError):
            return HubError(
                "LT-750", "the store's answers are cut short", file=self.at(name),
                expected=error.expected, got=error.got, hint="check the network and try again",
            )  # fmt: skip
        if isinstance(error, FileNotFoundError):
            return BadFileError("LT-300", "no such file or folder", file=self.at(name),
                                got=found.got, hint="check the address")  # fmt: skip
        if isinstance(found, DiskError):
            return DiskError("LT-601", "cannot read", file=self.at(name), got=found.got,
                             hint=found.hint)  # fmt: skip
        return found


class _ShortError(Exception):
    """Fewer bytes than asked for."""

    def __init__(self, expected: str, got: str) -> None:
        super().__init__(expected, got)
        self.expected, self.got = expected, got


def remote_at(folder: Address, name: str, entry: Entry) -> RemoteFile:
    """An object as a file that is read in place; without a tag its time must tell a change."""
    return RemoteFile(str(folder), name, entry.size, tag=entry.tag or entry.time)


def read_range(file: RemoteFile, start: int, count: int) -> bytes:
    """See `loratool.store.remote.read_range`."""
    store = _store_of(file)
    try:
        return store.range(f"/{file.name}", start, count)
    except LoratoolError as error:
        if _has_changed(file):
            raise changed(file) from error
        raise


def check_content(path: Path, file: RemoteFile) -> None:
    """See `loratool.store.remote.check_content`."""
    if stamp_now(file) != file.stamp:
        raise changed(file)


def stamp_now(file: RemoteFile) -> Stamp | None:
    """See `loratool.store.remote.stamp_now`."""
    store = _store_of(file)
    entry = store.look(f"/{file.name}")
    return None if entry is None else remote_at(store.address, file.name, entry).stamp


def _has_changed(file: RemoteFile) -> bool:
    try:
        return stamp_now(file) != file.stamp
    except LoratoolError:  # nobody knows
        return False


def _store_of(file: RemoteFile) -> InputStore:
    return InputStore(Address(*Path(file.root).parts))
