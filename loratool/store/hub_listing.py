"""One commit of a repository: its files with sizes and hashes, and fetching them verified."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from urllib.parse import quote, urlsplit

from loratool.errors import HubError
from loratool.frozen import Frozen
from loratool.lazy import regex
from loratool.report.text import plural
from loratool.store.checksum import digest_of
from loratool.store.hub import plain_errors, snapshot
from loratool.store.hub_download import download, missing_bytes, repo_folder
from loratool.store.hub_http import get_json, strange
from loratool.store.hub_names import ListedFile, Listing, check_names
from loratool.store.hub_retry import retried

MOST_FILES = 100_000
"""In a repository."""

_MOST_PAGES = 1_000
_MOST_SIZE = 1 << 50
_HASH = regex(r"[0-9a-f]{40}|[0-9a-f]{64}")


class _Lfs(Frozen):
    sha256: str | None = None
    oid: str | None = None  # the same hash, in a tree


class _Sibling(Frozen):
    rfilename: str
    size: int | None = None
    blobId: str | None = None  # the Hub's spelling
    lfs: _Lfs | None = None


class _Info(Frozen):
    sha: str
    siblings: list[_Sibling] | None = None


class _Entry(Frozen):
    type: str
    path: str
    size: int | None = None
    oid: str | None = None
    lfs: _Lfs | None = None


def list_commit(repo_id: str, revision: str | None) -> Listing:
    """Resolve a revision to a commit and list it, in one request (more of a bare mirror).

    Raises:
        HubError: missing, gated, no access, or not reachable; LT-723, what answers is no Hub;
            LT-721, a name that cannot be a file's.
        UsageError: ``repo_id`` cannot be a repository.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    with plain_errors(repo_id, revision):
        validate_repo_id(repo_id)
        api = f"{constants.ENDPOINT}/api/models/{repo_id}"
        url = f"{api}/revision/{quote(revision or 'main', safe='')}?blobs=true"
        info, _ = retried(lambda: get_json(url, _Info))
        if not is_hash(info.sha):
            raise strange(ascii(info.sha[:80]), key="sha", expected="a commit")
        rows = info.siblings or []
        if len(rows) > MOST_FILES:
            raise strange(plural(len(rows), "file"), expected=f"at most {MOST_FILES:,}")
        files = [ListedFile(row.rfilename, *_identity(row, row.blobId)) for row in rows]
        if not all(f.digest for f in files):  # mirrors may give hashes in the tree alone
            files = list(_tree(f"{api}/tree/{info.sha}?recursive=true"))
    check_names(repo_id, [f.name for f in files])
    return Listing(repo_id, revision, info.sha, tuple(sorted(files, key=lambda f: f.name)))


def _tree(url: str) -> Iterator[ListedFile]:
    """The files of a commit, page by page."""
    following: str | None = url
    count, seen = 0, set[str]()
    while following is not None:
        seen.add(following)
        page, following = retried(partial(get_json, following, list[_Entry]))
        count += len(page)
        if count > MOST_FILES or len(seen) > _MOST_PAGES or following in seen:
            raise strange(f"{count:,} on {len(seen):,} pages", expected=f"at most {MOST_FILES:,}")
        if following is not None and urlsplit(following)[:2] != urlsplit(url)[:2]:
            raise strange("a page of another host", expected="the next page")
        yield from (
            ListedFile(entry.path, *_identity(entry, entry.oid))
            for entry in page if entry.type == "file"
        )  # fmt: skip


def _identity(row: _Sibling | _Entry, blob: str | None) -> tuple[int, str]:
    """Size and hash of a file, as far as they are listed."""
    lfs = row.lfs and (row.lfs.sha256 or row.lfs.oid)
    size, hashes = row.size or 0, [found for found in (blob, lfs) if found]
    if not 0 <= size < _MOST_SIZE or not all(map(is_hash, hashes)):
        raise strange(ascii((size, *hashes))[:200], expected="a size and a hash")
    return size, (blob if row.lfs is None else lfs) or ""


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
        digest = blob if is_hash(blob) else ""
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


def is_hash(text: object) -> bool:
    """True for a commit, a git blob id or a sha256, in digits."""
    return isinstance(text, str) and _HASH.fullmatch(text) is not None
