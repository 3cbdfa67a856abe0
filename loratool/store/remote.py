"""Files that stay on the Hub: their size and hash are known, their bytes are read by range.

Such a file has a stub on this machine that holds its header and little more.  A stub is short,
never sparse: code that reads tensor bytes past this module fails instead of finding zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loratool.errors import HubError
from loratool.store.hub import plain_errors
from loratool.store.remote_http import Answer, ask

if TYPE_CHECKING:
    from loratool.store.hub_listing import Listing

_ATTEMPTS = 4
"""Answers cut short before giving up; each is continued where it ended."""
_EMPTY = 2  # of them without any data


@dataclass(frozen=True)
class RemoteFile:
    """A file of one commit.

    Attributes:
        repo_id: ``owner/name``.
        commit: full sha.
        name: path inside the repository.
        size: bytes.
        digest: sha256 of the content (LFS), or the git blob id of a small file.
    """

    repo_id: str
    commit: str
    name: str
    size: int
    digest: str

    def read(self, start: int, count: int) -> bytes:
        """Bytes of the file, in one request unless the connection breaks.

        Raises:
            HubError: LT-750 cut short again and again, LT-751 other bytes than those asked for;
                or the Hub does not give the file.
        """
        from huggingface_hub import hf_hub_url

        data = bytearray()
        empty = 0
        with plain_errors(self.repo_id, self.commit):
            url = hf_hub_url(self.repo_id, self.name, revision=self.commit)
            for _attempt in range(_ATTEMPTS):
                if len(data) < count and empty < _EMPTY:
                    first, left = start + len(data), count - len(data)
                    answer = ask(url, first, left)
                    self._check(answer, first, left)
                    data += answer.data
                    empty += not answer.data
        if len(data) < count:
            raise HubError(
                "LT-750", "the Hub's answers are cut short", file=self.shown,
                expected=f"{count} bytes at {start}", got=f"{len(data)} bytes",
                hint="check the network and try again",
            )  # fmt: skip
        return bytes(data)

    @property
    def shown(self) -> str:
        """Its name for messages."""
        return f"hf://{self.repo_id}@{self.commit}/{self.name}"

    def _check(self, answer: Answer, start: int, count: int) -> None:
        """Only the bytes asked for, of a file of the listed size.

        A server that knows no ranges sends the file from its start, which serves for headers.
        """
        want = f"bytes {start}-{start + count - 1}/{self.size}"
        if answer.status == 206 and answer.content_range == want:
            return
        if answer.status == 200 and start == 0:
            return
        raise HubError(
            "LT-751", "the server does not send the bytes asked for", file=self.shown,
            expected=want, got=answer.content_range or f"HTTP status {answer.status}",
            hint="check HF_ENDPOINT; loratool pull fetches whole files",
        )  # fmt: skip


_stubs: dict[Path, RemoteFile] = {}
_late: dict[Path, Callable[[], object]] = {}


def register(stubs: Mapping[Path, RemoteFile], late: Mapping[Path, Callable[[], object]]) -> None:
    """Make stubs known to everything that reads files.

    Args:
        stubs: read by range.
        late: small files that are fetched whole if somebody opens them.
    """
    _late.update(late)
    _stubs.update(stubs)


def forget(paths: Iterable[Path]) -> None:
    """The stubs are gone."""
    for path in paths:
        _stubs.pop(path, None)
        _late.pop(path, None)


def remote_file(path: Path) -> RemoteFile | None:
    """What a stub stands for; None for a file of this machine."""
    return _stubs.get(path)


def has_stub(file: RemoteFile) -> bool:
    """True if any stub stands for a file: one opened twice has two."""
    return file in list(_stubs.values())


def has_remote_files() -> bool:
    """True if any file is read by range."""
    return bool(_stubs)


def bring(path: Path) -> None:
    """Fetch a small file that has only been named so far; does nothing for any other."""
    fetch = _late.get(path)
    if fetch is not None:
        fetch()
        _late.pop(path, None)


def describe(listing: Listing, names: Iterable[str]) -> list[RemoteFile]:
    """Files of a listing by name."""
    wanted = set(names)
    return [
        RemoteFile(listing.repo_id, listing.commit, f.name, f.size, f.digest)
        for f in listing.files
        if f.name in wanted
    ]
