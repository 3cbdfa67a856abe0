"""Files that stay on the Hub: their size and hash are listed, their bytes are read by range."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from loratool.adapter import Stamp
from loratool.errors import STUBS, HubError
from loratool.location import RemoteFile
from loratool.store.checksum import digest_of
from loratool.store.hub import plain_errors
from loratool.store.hub_names import Listing
from loratool.store.remote_http import Answer, ask

_ATTEMPTS = 4
"""Answers cut short before giving up; each is continued where it ended."""
_EMPTY = 2  # of them without any data


def read_range(file: RemoteFile, start: int, count: int) -> bytes:
    """See `loratool.store.remote.read_range`."""
    from huggingface_hub import hf_hub_url

    data = bytearray()
    empty = 0
    repo, _, commit = file.root.removeprefix("hf://").partition("@")
    with plain_errors(repo, commit):
        url = hf_hub_url(repo, file.name, revision=commit)
        for _attempt in range(_ATTEMPTS):
            if len(data) < count and empty < _EMPTY:
                first, left = start + len(data), count - len(data)
                answer = ask(url, first, left, _note_of(file))
                _check(file, answer, first, left)
                data += answer.data
                empty += not answer.data
    if len(data) < count:
        raise HubError(
            "LT-750", "the Hub's answers are cut short", file=file,
            expected=f"{count} bytes at {start}", got=f"{len(data)} bytes",
            hint="check the network and try again",
        )  # fmt: skip
    return bytes(data)


def _note_of(file: RemoteFile) -> Path | None:
    """Where its signed address is kept: beside the stubs, in a folder that is the user's alone."""
    parents = () if file.stub is None else file.stub.parents
    top = next((p for p in parents if p.name.startswith(STUBS)), None)
    return None if top is None else top / hashlib.sha256(str(file).encode()).hexdigest()


def _check(file: RemoteFile, answer: Answer, first: int, left: int) -> None:
    """Only the bytes asked for, of a file of the listed size.

    A server that knows no ranges sends the file from its start, which serves for headers.
    """
    want = f"bytes {first}-{first + left - 1}/{file.size}"
    if answer.status == 206 and answer.content_range == want:
        return
    if answer.status == 200 and first == 0:
        return
    raise HubError(
        "LT-751", "the server does not send the bytes asked for", file=file,
        expected=want, got=answer.content_range or f"HTTP status {answer.status}",
        hint="check HF_ENDPOINT; loratool pull fetches whole files",
    )  # fmt: skip


def check_content(path: Path, file: RemoteFile) -> None:
    """See `loratool.store.remote.check_content`."""
    got = digest_of(path, file.digest)
    if got != file.digest:
        raise HubError(
            "LT-752", "the bytes read are not those that the Hub lists",
            file=file, expected=file.digest, got=got,
            hint="a proxy or mirror may be damaging it: try again, or check HF_ENDPOINT",
        )  # fmt: skip


def stamp_now(file: RemoteFile) -> Stamp:
    """What it was: a commit never changes."""
    return file.stamp


def describe(listing: Listing, names: Iterable[str]) -> list[RemoteFile]:
    """Files of a listing by name."""
    wanted = set(names)
    return [
        RemoteFile(f"hf://{listing.repo_id}@{listing.commit}", f.name, f.size, f.digest)
        for f in listing.files
        if f.name in wanted
    ]
