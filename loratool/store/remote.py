"""Files that stay on the Hub: their size and hash are known, their bytes are read by range.

Such a file has a stub on this machine that holds its header and little more.  A stub is short,
never sparse: code that reads tensor bytes past this module fails instead of finding zeros.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.errors import HubError
from loratool.store.hub import plain_errors

if TYPE_CHECKING:
    from loratool.store.hub_listing import Listing

_ATTEMPTS = 4
"""Answers cut short before giving up; each is continued where it ended."""
_WAIT_S = 30.0
_ANSWER_BYTES = 64 << 10


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
        data = bytearray()
        with plain_errors(self.repo_id, self.commit):
            for _attempt in range(_ATTEMPTS):
                if len(data) < count:
                    data += self._ask(start + len(data), count - len(data))
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

    def _ask(self, start: int, count: int) -> bytes:
        """One request; fewer bytes if the connection breaks."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            build_hf_headers,
            hf_raise_for_status,
            http_stream_backoff,
        )

        # The token is for the Hub: the client drops it when a redirect leads to another origin.
        headers = {
            **build_hf_headers(),
            "Range": f"bytes={start}-{start + count - 1}",
            "Accept-Encoding": "identity",
        }
        url = hf_hub_url(self.repo_id, self.name, revision=self.commit)
        with http_stream_backoff(
            "GET", url, headers=headers, follow_redirects=True, timeout=_WAIT_S, max_retries=2
        ) as response:
            if response.is_error:
                hf_raise_for_status(response)
            self._check_range(response, start, count)
            return _body(response, count)

    def _check_range(self, response: Any, start: int, count: int) -> None:
        """Only the bytes asked for, of a file of the listed size.

        A server that knows no ranges sends the file from its start, which serves for headers.
        """
        said = response.headers.get("Content-Range", "")
        want = f"bytes {start}-{start + count - 1}/{self.size}"
        if response.status_code == 206 and said == want:
            return
        if response.status_code == 200 and start == 0:
            return
        raise HubError(
            "LT-751", "the server does not send the bytes asked for", file=self.shown,
            expected=want, got=said or f"HTTP status {response.status_code}",
            hint="check HF_ENDPOINT; loratool pull fetches whole files",
        )  # fmt: skip


def _body(response: Any, count: int) -> bytes:
    """Up to ``count`` bytes of an answer; what came before the connection broke."""
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # httpx2 from 2.0 on

    data = bytearray()
    try:
        for part in response.iter_bytes(_ANSWER_BYTES):
            data += part
            if len(data) >= count:
                break
    except httpx.TransportError:
        pass  # the caller asks for the rest
    return bytes(data[:count])


_stubs: dict[Path, RemoteFile] = {}


def register(stubs: dict[Path, RemoteFile]) -> None:
    """Make stubs known to everything that reads files."""
    _stubs.update(stubs)


def forget(paths: Iterable[Path]) -> None:
    """The stubs are gone."""
    for path in paths:
        _stubs.pop(path, None)


def remote_file(path: Path) -> RemoteFile | None:
    """What a stub stands for; None for a file of this machine."""
    return _stubs.get(path)


def describe(listing: Listing, names: Iterable[str]) -> list[RemoteFile]:
    """Files of a listing by name."""
    wanted = set(names)
    return [
        RemoteFile(listing.repo_id, listing.commit, f.name, f.size, f.digest)
        for f in listing.files
        if f.name in wanted
    ]
