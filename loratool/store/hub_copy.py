"""Folders that hold nothing but unchanged files of a repository."""

from __future__ import annotations

import filecmp
from collections.abc import Iterator, Mapping
from pathlib import Path

from loratool.adapter import Stamp
from loratool.store.checksum import digest_of
from loratool.store.hub_download import repo_folder
from loratool.store.marker import Proof, walk
from loratool.store.stamps import stamp_of


def holds_exactly(folder: Path, digests: Mapping[str, str]) -> bool:
    """True if a folder holds these files and nothing else.

    Args:
        folder: on this machine.
        digests: path in it -> the hash that the Hub lists.
    """
    found = _files(folder) if folder.is_dir() else {}
    return found.keys() == digests.keys() and all(
        path is not None and digest_of(path, digests[name]) == digests[name]
        for name, path in found.items()
    )


def prove_copy(folder: Path, repo_id: str, sub: str) -> Proof:
    """Tell what of a folder the Hub's cache holds too: replacing that loses nothing.

    Args:
        folder: on this machine.
        repo_id: the repository whose copy it may be, at whatever commits.
        sub: folder of the repository, "" for its root.
    """
    stamps: dict[str, Stamp] = {}
    strangers = [] if folder.is_dir() else [folder.name]
    for name, path in (_files(folder) if folder.is_dir() else {}).items():
        stamp = None if path is None else stamp_of(path)
        if path is None or stamp is None or not any(
            filecmp.cmp(path, twin, shallow=False) for twin in _cached(repo_id, sub, name)
        ):  # fmt: skip
            strangers.append(name)
        else:
            stamps[name] = stamp
    folders = [n for n, is_file in walk(folder).items() if not is_file] if folder.is_dir() else []
    return Proof(stamps, strangers, folders)


def _files(folder: Path) -> dict[str, Path | None]:
    """Path in a folder -> file; None for what is neither a plain file nor a folder."""
    return {
        name: folder / name if is_file else None
        for name, is_file in walk(folder).items()
        if is_file or (folder / name).is_symlink() or not (folder / name).is_dir()
    }


def _cached(repo_id: str, sub: str, name: str) -> Iterator[Path]:
    """A file as it is at every commit that is in the cache."""
    for snapshot in (repo_folder(repo_id) / "snapshots").glob("*"):
        path = snapshot / sub / name
        if path.is_file():
            yield path
