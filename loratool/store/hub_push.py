"""Uploading in one commit, without losing anybody's work."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from loratool.errors import HubError, LoratoolError
from loratool.frozen import Frozen
from loratool.lazy import regex
from loratool.location import changed
from loratool.store.checksum import hash_like
from loratool.store.hub import plain_errors
from loratool.store.hub_download import xet_error
from loratool.store.hub_http import strange
from loratool.store.hub_listing import is_hash, list_commit
from loratool.store.hub_names import Listing
from loratool.store.hub_retry import pause_after, status_of
from loratool.store.known_file import SHA256, KnownFile
from loratool.store.push_files import Content

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

ATTEMPTS = 3
_IN_MEMORY = 64 << 20
_MOST_REGULAR = 20_000_000  # of a file inside a commit; the Hub says 10 MB
_WAIT_S = 0.5  # before the second attempt, and twice that before the third
_SHARD = regex(
    r"(?P<stem>.+?)(-\d{5}-of-\d{5})?(?P<tail>\.safetensors)|(?P<index>.+)\.safetensors\.index\.json"
)

Files = Mapping[str, Content]


class Destination(Frozen):
    """Where a commit goes.

    Attributes:
        repo_id: ``owner/name``.
        branch: an existing branch.
        create_pr: open a pull request instead of committing to the branch.
        message: the commit's title.
    """

    repo_id: str
    branch: str
    create_pr: bool
    message: str


class Landed(Frozen):
    """A commit that is on the Hub.

    Attributes:
        commit: its id; the head's if there was nothing to change.
        sent: names that were changed.
        deleted: names that were deleted.
        pull_request: address, None for a commit to the branch.
    """

    commit: str
    sent: tuple[str, ...]
    deleted: tuple[str, ...]
    pull_request: str | None = None


def create_repository(repo_id: str, *, private: bool) -> None:
    """Create a repository; one that appeared meanwhile is taken as it is.

    Raises:
        HubError: no permission, or the Hub cannot be reached.
    """
    from huggingface_hub import HfApi

    with plain_errors(repo_id, None, client=True):
        HfApi().create_repo(repo_id, private=private, exist_ok=True)


def create_branch(repo_id: str, branch: str) -> None:
    """Create a branch at the head of the default branch.

    Raises:
        HubError: no permission, or the Hub cannot be reached.
    """
    from huggingface_hub import HfApi

    with plain_errors(repo_id, None, client=True):
        HfApi().create_branch(repo_id, branch=branch, exist_ok=True)


def upload(place: Destination, start: Listing, build: Callable[[Listing], Files]) -> Landed:
    """Commit files on top of a head that is checked to be the one that was looked at.

    Args:
        place: repository, branch and message.
        start: the head that the caller looked at.
        build: all files for a given head; called again when the head moved.

    Raises:
        HubError: LT-712, somebody changed the same files; LT-713, it is not known whether a
            pull request was opened; LT-714, the Hub lists other bytes; LT-716, it refuses the
            card; and what it answers.
    """
    head = start
    for attempt in range(ATTEMPTS):
        files = build(head)
        sent, deleted = changes(head, files)
        if not sent and not deleted:
            return Landed(head.commit, (), ())
        try:
            landed = _commit(place, head, files, sent, deleted)
        except LoratoolError:
            raise
        except Exception as error:
            wait = None if attempt == ATTEMPTS - 1 else _WAIT_S * 2**attempt
            head = _after_failure(place, head, files, deleted, error, wait=wait)
            if _holds(head, files, deleted):  # it landed, and only the answer was lost
                return Landed(head.commit, sent, deleted)
            continue
        _check_landed(place, landed, files, deleted)
        return landed
    raise AssertionError("the last attempt returns or raises")


def changes(head: Listing, files: Files) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names that differ from a head, and weight files there that the new ones replace."""
    there = {f.name: f.digest for f in head.files}
    sent = [n for n, content in files.items() if n not in there or _differs(content, there[n])]
    stems = {_stem(n) for n in files} - {None}
    deleted = [n for n in there if n not in files and _stem(n) in stems]
    return tuple(sorted(sent)), tuple(sorted(deleted))


def _stem(name: str) -> str | None:
    match = _SHARD.fullmatch(name)
    return None if match is None else match["stem"] or match["index"]


def _differs(content: Content, digest: str) -> bool:
    if isinstance(content, KnownFile):
        return content.digest(digest) != digest
    made = hash_like(digest, len(content))
    made.update(content)
    return made.hexdigest() != digest


def _holds(head: Listing, files: Files, deleted: tuple[str, ...]) -> bool:
    there = {f.name: f.digest for f in head.files}
    complete = all(n in there and not _differs(c, there[n]) for n, c in files.items())
    return complete and not set(deleted) & set(there)


def _commit(
    place: Destination, head: Listing, files: Files, sent: tuple[str, ...], deleted: tuple[str, ...]
) -> Landed:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    added = [CommitOperationAdd(name, source) for name, source in _sources(files, sent)]
    with plain_errors(place.repo_id, place.branch, client=True), _progress(added):
        try:  # all content first: what fails here has changed nothing, and need not be sent again
            HfApi().preupload_lfs_files(
                place.repo_id, added, revision=place.branch, create_pr=place.create_pr
            )
        except RuntimeError as error:  # the client's wrapper; its cause has a signed address
            raise error.__cause__ or xet_error(place.repo_id) from None
    for one in added:
        _check_sent(one, files[one.path_in_repo])
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        *(CommitOperationDelete(name) for name in deleted),
        *added,
    ]
    info = HfApi().create_commit(
        place.repo_id, operations, commit_message=place.message, revision=place.branch,
        create_pr=place.create_pr, parent_commit=head.commit,
    )  # fmt: skip
    if not is_hash(info.oid) or not isinstance(info.pr_url, str | None):
        raise strange(ascii(info.oid)[:80], key="commitOid", expected="a commit")
    return Landed(info.oid, sent, deleted, info.pr_url)


def _sources(files: Files, sent: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """What the client reads: memory as long as there is room, else a file that checks itself.

    Xet reads files by their names alone: what it has sent is compared afterwards.
    """
    from huggingface_hub.utils._runtime import is_xet_available

    left = _IN_MEMORY
    for name in sent:
        content = files[name]
        if isinstance(content, KnownFile) and content.size <= left:
            left -= content.size
            content.seek(0)
            yield name, content.read()
        elif isinstance(content, KnownFile) and is_xet_available():
            yield name, content.path
        else:
            yield name, content


@contextmanager
def _progress(added: list[CommitOperationAdd]) -> Iterator[None]:
    """A bar over the files that the client itself shows none for."""
    from huggingface_hub.utils.tqdm import tqdm

    files = [one.path_or_fileobj for one in added if isinstance(one.path_or_fileobj, KnownFile)]
    total = sum(file.size for file in files)
    with tqdm(  # type: ignore[no-untyped-call]
        total=total, desc="upload", unit="B", unit_scale=True, leave=False,
        disable=None if files else True,
    ) as bar:  # fmt: skip
        for file in files:
            file.moved = bar.update
        yield


def _check_sent(one: CommitOperationAdd, content: Content) -> None:
    """Before the commit: what is there now is what was checked."""
    if isinstance(content, KnownFile) and isinstance(one.path_or_fileobj, str):
        if one.upload_info.sha256.hex() != content.digest(SHA256):
            raise changed(content.path)
        content.check_unchanged()
    if one._upload_mode == "regular" and one.upload_info.size > _MOST_REGULAR:
        raise strange("a large file asked for in one piece", key="uploadMode")


def _after_failure(
    place: Destination,
    head: Listing,
    files: Files,
    deleted: tuple[str, ...],
    error: Exception,
    *,
    wait: float | None,
) -> Listing:
    """The new head, if trying again (or finding the commit there) makes sense; else raise.

    ``wait`` are the seconds before trying again; None = that was the last attempt.
    """
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # httpx2 from 2.0 on

    status = status_of(error)
    if status is None and isinstance(error, ValueError) and "README.md" in str(error):
        raise HubError(
            "LT-716", "the Hub refuses the front matter of the model card", file="README.md",
            hint="loratool push --dry-run -v shows the card",
        ) from None  # fmt: skip
    is_lost = status is not None and status >= 500
    is_lost |= status is None and isinstance(
        error, httpx.HTTPError | ConnectionError | TimeoutError
    )
    pause = None if wait is None else pause_after(error, wait)
    if status == 429 and pause is not None:  # nothing has happened
        time.sleep(pause)
        return head
    if status != 412 and not is_lost:
        with plain_errors(place.repo_id, place.branch, client=True):
            raise error
    if is_lost and place.create_pr:
        raise HubError(
            "LT-713", "the answer was lost: the pull request may or may not be open",
            file=place.repo_id, hint="look at the repository's discussions before pushing again",
        ) from None  # fmt: skip
    now = list_commit(place.repo_id, place.branch)
    if _holds(now, files, deleted):
        return now
    ours = (set(files) - {"README.md"}) | set(deleted)
    before, after = ({f.name: f.digest for f in h.files if f.name in ours} for h in (head, now))
    if before != after:
        clash = ", ".join(sorted(n for n in ours if before.get(n) != after.get(n)))
        raise HubError(
            "LT-712", "somebody else changed the same files meanwhile", file=place.repo_id,
            got=clash, hint="look at what is there; then push again, or use --create-pr",
        ) from None  # fmt: skip
    if wait is None:
        with plain_errors(place.repo_id, place.branch):
            raise error
    time.sleep(pause or 0.0)
    return now


def _check_landed(
    place: Destination, landed: Landed, files: Files, deleted: tuple[str, ...]
) -> None:
    revision = landed.commit
    if not _holds(list_commit(place.repo_id, revision), files, deleted):
        raise HubError(
            "LT-714", "the Hub lists other files than were sent",
            file=f"{place.repo_id}@{revision}",
            hint="a proxy or mirror may be damaging them: try again, or check HF_ENDPOINT",
        )  # fmt: skip
