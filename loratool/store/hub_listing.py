"""One commit of a repository: its files with sizes and hashes, and fetching them verified."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratool.errors import HubError
from loratool.store.hub import plain_errors, snapshot
from loratool.store.hub_client import SILENCE_S
from loratool.store.hub_download import download, missing_bytes, repo_folder
from loratool.store.hub_retry import retried

_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True)
class ListedFile:
    """A file as the Hub lists it.

    Attributes:
        name: path inside the repository.
        size: bytes.
        digest: sha256 of the content (LFS), or the git blob id (SHA-1) of a small file.
    """

    name: str
    size: int
    digest: str


@dataclass(frozen=True)
class Listing:
    """The files of one commit, the revision that led to it, and their folder if cached."""

    repo_id: str
    revision: str | None
    commit: str
    files: tuple[ListedFile, ...]
    cached: Path | None = None


def list_commit(repo_id: str, revision: str | None) -> Listing:
    """Resolve a revision to a commit and list it, in one request (two of a bare mirror).

    Raises:
        HubError: missing, gated, no access, or not reachable.
        UsageError: ``repo_id`` cannot be a repository.
    """
    from huggingface_hub import HfApi, RepoFile

    with plain_errors(repo_id, revision):
        info = retried(
            lambda: HfApi().model_info(
                repo_id, revision=revision or "main", files_metadata=True, timeout=SILENCE_S
            )
        )
        files = [_listed(s.rfilename, s) for s in info.siblings or ()]
        if not all(f.digest for f in files):  # mirrors may give hashes in the tree alone
            tree = retried(
                lambda: list(HfApi().list_repo_tree(repo_id, revision=info.sha, recursive=True))
            )
            files = [_listed(entry.path, entry) for entry in tree if isinstance(entry, RepoFile)]
    return Listing(repo_id, revision, str(info.sha), tuple(sorted(files, key=lambda f: f.name)))


def _listed(name: str, entry: Any) -> ListedFile:
    return ListedFile(name, entry.size or 0, entry.lfs.sha256 if entry.lfs else entry.blob_id or "")


def list_cached(repo_id: str, revision: str | None) -> Listing:
    """The same from the Hub's cache alone: no connection is made.

    The cache names its blobs by their hashes, so that these can be verified again.

    Raises:
        HubError: LT-706, the revision is not in the cache.
    """
    marks = ("adapter_config.json", "config.json", "model_index.json")
    folder, commit = snapshot(repo_id, revision, allow_patterns=marks, offline=True)
    files = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        blob = path.resolve().name
        digest = blob if _BLOB.fullmatch(blob) else ""
        files.append(ListedFile(path.relative_to(folder).as_posix(), path.stat().st_size, digest))
    return Listing(repo_id, revision, commit, tuple(files), folder)


def bytes_to_fetch(listing: Listing, wanted: Sequence[ListedFile]) -> int:
    """How much of ``wanted`` is not in the cache yet."""
    return sum(missing_bytes(listing, file) for file in wanted)


def fetch_verified(listing: Listing, wanted: Sequence[ListedFile]) -> list[Path]:
    """Fetch files into the Hub's cache, each compared with its listed hash.

    A file with other bytes, in the cache too, is deleted and fetched once more.

    Raises:
        HubError: LT-710, the bytes are wrong twice; or the Hub does not give the file.
    """
    paths = [_fetch_one(listing, file) for file in wanted]
    if listing.cached is None:
        _remember(listing)
    return paths


def _remember(listing: Listing) -> None:
    """Note in the cache, if it can be written, what the revision means: for use offline."""
    revision = listing.revision or "main"
    if revision == listing.commit or ".." in revision.split("/") or revision.startswith("/"):
        return
    ref = repo_folder(listing.repo_id) / "refs" / revision
    with suppress(OSError):
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(listing.commit)


def _fetch_one(listing: Listing, file: ListedFile) -> Path:
    if listing.cached is not None:
        path = listing.cached / file.name
        if not file.digest or digest_of(path, file.digest) == file.digest:
            return path
    else:
        for _attempt in range(2):
            if found := download(listing, file):
                return found
    raise HubError(
        "LT-710", "the downloaded bytes are not those that the Hub lists", key=file.name,
        file=f"{listing.repo_id}@{listing.commit}", expected=file.digest,
        hint="a proxy or mirror may be damaging it: try again, or check HF_ENDPOINT",
    )  # fmt: skip


def digest_of(path: Path, like: str) -> str:
    """Hash of a file in the form of ``like``: sha256 (64 digits) or git blob id (40)."""
    with path.open("rb") as file:
        if len(like) == 64:
            return hashlib.file_digest(file, "sha256").hexdigest()
        data = file.read()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
