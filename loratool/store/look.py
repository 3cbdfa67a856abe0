"""Look at a repository without downloading it: which files, and where they come to lie."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from loratool.frozen import Frozen
from loratool.location import RemoteFile
from loratool.store.hub_files import (
    files_to_look_at,
    is_read,
    is_weight_name,
    nothing_there,
    source_files,
)
from loratool.store.hub_names import Listing, refuse_large
from loratool.store.hub_range import describe
from loratool.store.remote_folder import RemoteFolder

LOOK_BYTES = 100_000_000
"""Configurations and headers read without asking."""

_SHA256_DIGITS = 64


class Looked(Frozen):
    """Where the files of a commit can be read.

    Attributes:
        path: folder whose paths are those of the repository.
        commit: full sha.
        remote: keeps the stubs alive; None if the cache holds the files whole.
    """

    path: Path
    commit: str
    remote: RemoteFolder | None = None


def look(listing: Listing, *, kind: str, sub: str = "", yes: bool = False) -> Looked:
    """Fetch the headers and configurations of a source; the rest is read when it is needed.

    Args:
        listing: the commit.
        kind: ``adapter``, ``base``, or ``any`` for whatever lies there: then small files beside
            the configurations are only named.
        sub: path inside the repository.
        yes: consent to more than `LOOK_BYTES`.

    Raises:
        HubError: nothing there, no access, not reachable, damaged answers, or a small file that
            is not small.
        UsageError: LT-265, very many files and no consent.
    """
    repo_id = listing.repo_id
    names = [f.name for f in listing.files if _is_plain(f.name)]
    if kind == "any":
        wanted, named = files_to_look_at(names, sub)
        if not any(map(is_weight_name, (*wanted, *named))):
            raise nothing_there(repo_id, names, kind, sub)
    else:
        wanted, named = source_files(repo_id, names, kind, sub), []
    cached = _cached(listing, wanted)
    if cached is not None:
        return Looked(cached, listing.commit)
    files = describe(listing, wanted)
    weights = [f for f in files if _stays(f)]
    rest = [f for f in files if not _stays(f)]
    small = [f for f in rest if is_read(f.name.rpartition("/")[2])]
    for file in rest:
        refuse_large(repo_id, file)
    folder = RemoteFolder(f"hf://{repo_id}@{listing.commit[:7]}", None if yes else LOOK_BYTES)
    folder.fill(weights, small, [f for f in rest if f not in small], describe(listing, named))
    return Looked(folder.path, listing.commit, folder)


def _stays(file: RemoteFile) -> bool:
    """True if a file is read by range.  Its identity must be listed: the sha256 of LFS files."""
    return is_weight_name(file.name) and len(file.digest) == _SHA256_DIGITS


def _is_plain(name: str) -> bool:
    """True for names that cannot lead out of a folder, whatever a mirror lists."""
    return "\\" not in name and not {"", ".", ".."} & set(name.split("/"))


def _cached(listing: Listing, names: Sequence[str]) -> Path | None:
    """The snapshot in the Hub's cache, if it holds all these files."""
    from huggingface_hub import try_to_load_from_cache

    found = ""
    for name in names:
        path = try_to_load_from_cache(listing.repo_id, name, revision=listing.commit)
        if not isinstance(path, str):
            return None
        found = path
    return Path(found).parents[names[-1].count("/")] if found else None
