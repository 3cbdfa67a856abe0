"""One request to the Hub, with limits: how much may come, how slowly, and from where.

What answers may be a mirror, a proxy or a login page.  So nothing is read before it is known how
much it may be, no answer takes longer than a slow line would, and none moves the token to another
host.
"""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from loratool import __version__
from loratool.errors import HubError
from loratool.shapes import checked_json

T = TypeVar("T")

SILENCE_S = 60.0
"""A server that says nothing for so long is gone; by itself the client waits for ever."""
SLOWEST = 4_000
"""Bytes a second: what is slower than a modem, for longer than `SILENCE_S`, is given up."""
DRIP_S, DRIP_BYTES = 2.0, 100
"""Lines break and wait, but bring packets: fewer bytes than this, each second and each time that
some come, are dripped by a server."""
ANSWER_BYTES = 16_000_000
"""Of an answer in JSON."""
MOST_HOPS = 5

CHECK_ENDPOINT = "check HF_ENDPOINT: a proxy, a mirror or a login page may be answering"


class SlowError(TimeoutError):
    """An answer came too slowly to wait for its end."""


@contextmanager
def get(
    url: str,
    headers: Mapping[str, str] | None = None,
    *,
    token: bool = True,
    wait: float | None = None,
    method: str = "GET",
    hops: int = MOST_HOPS,
) -> Iterator[Any]:
    """The client's response to a GET, with its body unread; see `parts`.

    Redirects are followed: a few, over HTTP, never from an encrypted place to an open one.

    Args:
        url: of the Hub, or of a place to which it led.
        headers: of the request, beside the usual ones.
        token: of the login may be sent; the client takes it out when a redirect leaves the host.
        wait: seconds of silence, None = `SILENCE_S`.
        method: GET or HEAD.
        hops: redirects that are followed; 0 gives the first response, whatever it is.

    Raises:
        HubError: LT-725, it leads to a place where nobody should go, or is packed.
        SlowError: there is no answer in time.
        HTTPError: of the client; see `loratool.store.hub.plain_errors`.
    """
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

    wait = SILENCE_S if wait is None else wait
    session = get_session()
    sent = {**own_headers(token=token), **(headers or {})}
    request = session.build_request(method, url, headers=sent, timeout=wait)
    for _hop in range(hops + 1):
        refuse_place(request.url.scheme, url)
        response = in_time(
            partial(session.send, request, stream=True, follow_redirects=False), 2 * wait
        )
        try:
            refuse_packed(response)
            if response.next_request is None or hops == 0:
                yield response
                return
            request = response.next_request
        finally:
            response.close()
    raise HubError(
        "LT-725", "the server redirects again and again", hint=CHECK_ENDPOINT,
        expected=f"at most {hops} times",
    )  # fmt: skip


def own_headers(*, token: bool = True) -> dict[str, str]:
    """Headers of a request; those of the client ask the Hub first which programs there are.

    Args:
        token: with that of the login, if there is one and the client may use it.
    """
    from huggingface_hub import constants, get_token

    headers = {"User-Agent": f"loratool/{__version__}", "Accept-Encoding": "identity"}
    if token and not constants.HF_HUB_DISABLE_IMPLICIT_TOKEN and (found := get_token()):
        headers["Authorization"] = f"Bearer {found}"
    return headers


def refuse_place(scheme: str, start: str) -> None:
    """Only HTTP, and nothing in the open that began encrypted.

    Raises:
        HubError: LT-725.
    """
    if scheme not in ("http", "https") or (scheme == "http" and start.startswith("https:")):
        raise HubError(
            "LT-725", "the server redirects to a place that is not safe",
            got=f"{ascii(scheme)[1:-1]}:", hint=CHECK_ENDPOINT,
        )  # fmt: skip


def refuse_packed(response: Any) -> None:
    """A few bytes of gzip can hold gigabytes, and nobody asked for it.

    Raises:
        HubError: LT-725.
    """
    packed = response.headers.get("Content-Encoding", "identity")
    if packed.lower() not in ("", "identity"):
        raise HubError(
            "LT-725", "the server sends packed data that nobody asked for", got=packed,
            hint=CHECK_ENDPOINT,
        )  # fmt: skip


def in_time(call: Callable[[], T], wait: float) -> T:
    """A call that ends, or is left behind: the client's limits are for single reads, not for all.

    Raises:
        SlowError: after ``wait`` seconds.
    """
    done: Future[T] = Future()
    context = contextvars.copy_context()

    def run() -> None:
        try:
            done.set_result(context.run(call))
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return done.result(wait)
    except TimeoutError as error:
        if done.done():
            raise
        done.add_done_callback(_hang_up)
        raise SlowError(f"no answer in {wait:g} s") from error


def _hang_up(late: Future[Any]) -> None:
    if late.exception() is None:
        late.result().close()


def parts(response: Any, most: int | None = ANSWER_BYTES) -> Iterator[bytes]:
    """The body of a response, piece by piece.

    Args:
        response: of `get`.
        most: bytes, None = any number: then the reader knows when it has enough.

    Raises:
        HubError: LT-724, there is more.
        SlowError: it comes too slowly.
    """
    declared = response.headers.get("Content-Length", "")
    if most is not None and declared.isdecimal() and int(declared[:20]) > most:
        raise _too_much(most)
    yield from bounded(response.iter_raw(), most)


def bounded(pieces: Iterable[bytes], most: int | None) -> Iterator[bytes]:
    """The same pieces, as long as they are not too many and come in time.

    Raises:
        HubError: LT-724, there is more than ``most``.
        SlowError: it comes too slowly.
    """
    source = iter(pieces)
    waited, got, count = 0.0, 0, 0
    while True:
        start = time.monotonic()
        piece = next(source, None)
        if piece is None:
            return
        waited += time.monotonic() - start  # what the reader does with a piece is its own time
        got, count = got + len(piece), count + 1
        if most is not None and got > most:
            raise _too_much(most)
        is_drip = waited > DRIP_S and count > 2 and got < DRIP_BYTES * min(count, waited)
        if is_drip or waited > SILENCE_S + got / SLOWEST:
            raise SlowError(f"{got:,} bytes in {waited:.0f} s")
        yield piece


def _too_much(most: int) -> HubError:
    return HubError(
        "LT-724", "the answer is larger than such an answer can be",
        expected=f"at most {most:,} bytes", hint=CHECK_ENDPOINT,
    )  # fmt: skip


def check_status(response: Any) -> None:
    """Raise the client's error for a status that is one; the body is not looked at.

    Raises:
        HfHubHTTPError: see `loratool.store.hub.plain_errors`.
    """
    from huggingface_hub.utils import hf_raise_for_status, httpx  # type: ignore[attr-defined]

    told = ("X-Error-Code", "X-Error-Message", "Retry-After", "RateLimit")
    headers = {name: response.headers[name] for name in told if name in response.headers}
    bare = httpx.Response(response.status_code, headers=headers, request=response.request)
    hf_raise_for_status(bare)
    if response.status_code not in (200, 206):
        raise strange(f"HTTP status {response.status_code}")


def get_json(url: str, shape: type[T], *, wait: float | None = None) -> tuple[T, str | None]:
    """An answer of the Hub's API, and the address of its next page.

    Args:
        url: of the API.
        shape: that the answer must have.
        wait: seconds of silence, None = a third of `SILENCE_S`: then it is asked again.

    Raises:
        HubError: LT-723, it is none; see `get` and `parts`.
        SlowError, HTTPError: see `get`.
    """

    def refuse(key: str | None, expected: str, got: str | None) -> Any:
        raise strange(got or "", key=key, expected=expected)

    with get(url, wait=SILENCE_S / 3 if wait is None else wait) as response:
        check_status(response)
        data = b"".join(parts(response))
        following = response.links.get("next", {}).get("url")
    return checked_json(data, shape, refuse), following


def strange(got: str, *, key: str | None = None, expected: str | None = None) -> HubError:
    """The error for an answer that no Hub would give."""
    return HubError(
        "LT-723", "what answers does not answer as the Hub does", key=key, expected=expected,
        got=got or None, hint=CHECK_ENDPOINT,
    )  # fmt: skip
