"""A source in an object store: which of its files are fetched, and which are read in place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from loratool.errors import BadFileError, HubError
from loratool.store.address import Address
from loratool.store.file_kinds import kind_of
from loratool.store.hub_fetch import ASK_BYTES
from loratool.store.hub_files import CONFIGS, all_adapters, files_to_look_at, is_weight_name
from loratool.store.hub_names import is_bad
from loratool.store.look import LOOK_BYTES
from loratool.store.object_store import Entry
from loratool.store.remote_folder import RemoteFolder
from loratool.store.rules import Reach
from loratool.store.store_range import InputStore, remote_at

_IN_PLACE = (".safetensors", ".gguf")
_DEEPEST = 2
"""Folders below that of a source in which nothing is looked for."""


def fetch(address: Address, kind: str, reach: Reach) -> tuple[Path, RemoteFolder]:
    """Bring a source within reach: headers of weights, small files whole.

    All else that lies there is only named, and comes if it is opened.

    Args:
        address: of a folder or a file.
        kind: ``adapter``, ``base`` or ``any``.
        reach: how it may be used; what is no look alone has all small files that may go along.

    Returns:
        Where the source lies on this machine, and what keeps it there.

    Raises:
        BadFileError: LT-300, nothing is there; LT-332, it changes meanwhile.
        DiskError: LT-601, no permission.
        HubError: LT-740, LT-750: the store does not answer.
        UsageError: LT-265, it would be much, and nobody has agreed.
    """
    if reach.offline:
        raise HubError("LT-740", "--offline: nothing is read in the object store", file=address,
                       hint="without --offline")  # fmt: skip
    top, sub, found = _list(address)
    files = {name: remote_at(top, name, entry) for name, entry in found.items()}
    chosen = _chosen(list(found), sub, kind, reach)
    near = {name for name in chosen if name.endswith(_IN_PLACE) and not reach.whole}
    most = LOOK_BYTES if reach.in_place else ASK_BYTES
    folder = RemoteFolder(str(top), None if reach.yes else most)
    folder.fill(
        [files[name] for name in sorted(near)], [files[name] for name in sorted(chosen - near)],
        [file for name, file in files.items() if name not in chosen],
    )  # fmt: skip
    return folder.path / sub, folder


def _chosen(names: Sequence[str], sub: str, kind: str, reach: Reach) -> set[str]:
    """The files that are looked into, and where more than a look is meant those beside them."""
    chosen = set(files_to_look_at(names, sub)[0])
    if reach.in_place:
        return chosen
    places = {} if kind == "base" else all_adapters(names, sub)
    for own in places.values() if len(places) == 1 else ():  # several are refused by their names
        chosen.update(own)
    return chosen | {n for n in names if not is_weight_name(n) and kind_of(n)}


def _list(address: Address) -> tuple[Address, str, dict[str, Entry]]:
    """The folder of a source, the file in it that was named, and what lies in the folder."""
    store = InputStore(address)
    entry = store.look("")
    if entry is None:
        found = {name.removeprefix("/"): one for name, one in store.listing().items()}
        if not found:
            raise BadFileError("LT-300", "no such file or folder", file=address,
                               hint="check the address")  # fmt: skip
        return address, "", _timed(store, usable(found))
    top = address.parent
    if address.name.endswith(".index.json"):  # of shards beside it
        return top, address.name, _list(top)[2]
    beside = InputStore(top)
    seen = dict(zip(CONFIGS, beside.each([f"/{name}" for name in CONFIGS], beside.look),
                    strict=True))  # fmt: skip
    return top, address.name, {address.name: entry} | {n: e for n, e in seen.items() if e}


def _timed(store: InputStore, found: dict[str, Entry]) -> dict[str, Entry]:
    """Entries that a later look can be compared with: drivers list times in other words."""
    bare = [name for name, entry in found.items() if not entry.tag]
    seen = store.each([f"/{name}" for name in bare], store.look)
    return found | {name: one for name, one in zip(bare, seen, strict=True) if one}


def usable(found: dict[str, Entry]) -> dict[str, Entry]:
    """Without names that cannot be a file's, or that are too deep to matter."""
    folders = {name[:at] for name in found for at, char in enumerate(name) if char == "/"}
    return {
        name: entry for name, entry in found.items()
        if name.count("/") <= _DEEPEST and "\\" not in name
        and not is_bad(name) and name not in folders
    }  # fmt: skip
