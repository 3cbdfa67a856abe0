"""How the Hub's client behaves: what it shows in a command, and its limits while it is at work.

Most requests are our own, see `loratool.store.hub_http`.  Uploads are the client's; while it makes
them, every answer has the same limits, and the token leaves for no other host.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from loratool.errors import HubError, redact
from loratool.lazy import regex
from loratool.store import hub_http
from loratool.store.hub_retry import LONGEST_WAIT_S, seconds_asked

_QUERY = regex(r"(?<=[\w/])\?[^\s'\"]+")


def prepare_client(*, quiet: bool) -> None:
    """Give the client discretion, and progress bars if people look at a terminal.

    Args:
        quiet: no progress bars in any case.
    """
    from huggingface_hub.utils import logging as client_logging
    from huggingface_hub.utils.tqdm import disable_progress_bars

    for handler in client_logging.get_logger().handlers:
        handler.addFilter(_discreet)
    if quiet or not sys.stderr.isatty():
        disable_progress_bars()


@contextmanager
def guarded_client() -> Iterator[None]:
    """Limits for all that the client asks for itself; afterwards it is as it was."""
    from huggingface_hub import constants, set_client_factory
    from huggingface_hub.utils import _http

    factory, quiet = _http._GLOBAL_CLIENT_FACTORY, constants.HF_HUB_DISABLE_TELEMETRY
    set_client_factory(lambda: _guard(factory()))
    constants.HF_HUB_DISABLE_TELEMETRY = True  # else it asks, and keeps, what it tells of programs
    try:
        yield
    finally:
        set_client_factory(factory)
        constants.HF_HUB_DISABLE_TELEMETRY = quiet


def _guard(client: Any) -> Any:
    send = client.send

    def send_in_time(request: Any, **how: Any) -> Any:
        size = request.headers.get("Content-Length", "0")
        wait = 2 * hub_http.SILENCE_S + int(size) / hub_http.SLOWEST  # what is sent counts, too
        return hub_http.in_time(lambda: send(request, **how), wait)

    client.send = send_in_time
    client.timeout = hub_http.SILENCE_S
    client.event_hooks["request"].append(_keep_token)
    client.event_hooks["response"] += [_refuse_long_waits, _bound]
    return client


def _keep_token(request: Any) -> None:
    """An answer may name any address to go on with; the token is for the Hub alone."""
    from huggingface_hub import constants

    hub_http.refuse_place(request.url.scheme, constants.ENDPOINT)
    request.headers["Accept-Encoding"] = "identity"
    if urlsplit(str(request.url))[:2] != urlsplit(constants.ENDPOINT)[:2]:
        request.headers.pop("Authorization", None)


def _refuse_long_waits(response: Any) -> None:
    """The client obeys any Retry-After: a command that sleeps for an hour seems to hang."""
    asked = seconds_asked(response)
    if response.status_code not in (429, 503) or asked is None or asked <= LONGEST_WAIT_S:
        return
    if response.status_code == 503 and "/commit/" in response.request.url.path:
        return  # the commit may be there: that is looked into first
    raise HubError(
        "LT-709", "the Hub asks to slow down", got=f"HTTP status {response.status_code}",
        expected=f"a pause of {asked:,.0f} s", hint="try again after that",
    )  # fmt: skip


def _bound(response: Any) -> None:
    """Before the client reads a body, limit it."""
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # httpx2 from 2.0 on

    class Bounded(httpx.SyncByteStream):
        def __init__(self, stream: Any) -> None:
            self._stream = stream

        def __iter__(self) -> Iterator[bytes]:
            yield from hub_http.bounded(self._stream, hub_http.ANSWER_BYTES)

        def close(self) -> None:
            self._stream.close()

    hub_http.refuse_packed(response)
    response.stream = Bounded(response.stream)


def _discreet(record: logging.LogRecord) -> bool:
    """The client's warnings name addresses, with keys, and repeat what servers say."""
    text = _QUERY.sub("?...", redact(record.getMessage()))
    shown = (c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
    record.msg, record.args = "".join(shown), ()
    return True
