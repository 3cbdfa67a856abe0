"""Byte ranges over HTTP, one request each, on connections that stay open.

A file's address on the Hub leads to a signed one at its storage, which is asked directly from
then on.  The signed address is a secret: it is never shown, nor logged, and is kept in a folder
that is the user's alone and goes away with the run.  It expires; then the Hub is asked for a new
one.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from loratool.frozen import Frozen
from loratool.store.hub_http import SlowError, check_status, get, parts
from loratool.store.hub_retry import retried

_WAIT_S = 30.0


class Answer(Frozen):
    """What a server sent.

    Attributes:
        status: 206, or 200 from a server that knows no ranges.
        content_range: that header, "" without.
        data: the bytes that came before the connection broke, at most those asked for.
    """

    status: int
    content_range: str
    data: bytes


def ask(url: str, start: int, count: int, note: Path | None = None) -> Answer:
    """Ask for bytes of a file.

    Args:
        url: on the Hub.
        start: first byte.
        count: how many, 1 or more.
        note: file with the address that ``url`` led to before, on another host; None = no memory.

    Raises:
        HfHubHTTPError, HTTPError: of the client; see `loratool.store.hub.plain_errors`.
    """
    wanted = {"Range": f"bytes={start}-{start + count - 1}"}
    if signed := _signed(note):
        answer = _ask_storage(signed, wanted, count)
        if answer is not None:
            return answer
    return retried(lambda: _ask_hub(url, wanted, count, note))


def _signed(note: Path | None) -> str:
    with suppress(OSError):  # nobody has been there
        return "" if note is None else note.read_text()
    return ""


def _ask_storage(url: str, wanted: dict[str, str], count: int) -> Answer | None:
    """None if the address has expired, or the storage is busy or out of reach."""
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # httpx2 from 2.0 on

    try:
        with get(url, wanted, token=False, wait=_WAIT_S) as response:
            return None if response.is_error else _answer(response, count)
    except (httpx.TransportError, SlowError):
        return None


def _ask_hub(url: str, wanted: dict[str, str], count: int, note: Path | None) -> Answer:
    with get(url, wanted, wait=_WAIT_S) as response:
        check_status(response)
        is_far = urlsplit(str(response.url)).netloc != urlsplit(url).netloc
        if note is not None:
            with suppress(OSError):  # a full disk costs a question
                note.write_text(str(response.url) if is_far else "")
        return _answer(response, count)


def _answer(response: Any, count: int) -> Answer:
    said = response.headers.get("Content-Range", "")
    return Answer(response.status_code, said, _body(response, count))


def _body(response: Any, count: int) -> bytes:
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # httpx2 from 2.0 on

    data = bytearray()
    try:
        for part in parts(response, most=None):
            data += part
            if len(data) > count:  # a whole file instead of a range: hang up
                break
    except (httpx.TransportError, SlowError):
        pass  # the caller asks for the rest
    return bytes(data[:count])
