"""Asking the Hub again after an answer that means "not now", or that broke off."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

from loratool.store.hub_http import SlowError

T = TypeVar("T")

LONGEST_WAIT_S = 30.0
"""A Retry-After beyond this is reported, not obeyed."""

_WAITS = (0.5, 2.0)  # seconds before the second and the third attempt
_BUSY = (429, 500, 502, 503, 504)


def status_of(error: BaseException) -> int | None:
    """HTTP status of a client's error, None if there was no answer."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def is_broken(error: BaseException) -> bool:
    """True if a connection stood and then broke, or fell silent or slow."""
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # httpx2 from 2.0 on

    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return False  # there is nobody
    broken = (httpx.NetworkError, httpx.RemoteProtocolError, httpx.TimeoutException, SlowError)
    return isinstance(error, broken)


def pause_after(error: BaseException, wait: float) -> float | None:
    """Seconds to wait before asking again: ``wait``, or what the Hub asks for.

    None if asking again is of no use.
    """
    if is_broken(error):
        return wait
    if status_of(error) not in _BUSY:
        return None
    asked = seconds_asked(error.response)  # type: ignore[attr-defined]
    pause = wait if asked is None else asked
    return pause if pause <= LONGEST_WAIT_S else None


def seconds_asked(response: Any) -> float | None:
    """What the Hub asks to wait, None if it does not say so in seconds."""
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

    limits = parse_ratelimit_headers(response.headers)
    if response.status_code == 429 and limits is not None and limits.remaining == 0:
        return float(limits.reset_in_seconds)  # the client obeys this first
    asked = str(response.headers.get("Retry-After", ""))
    return float(asked) if asked.isascii() and asked.isdigit() else None


def retried(call: Callable[[], T]) -> T:
    """Call up to three times while the Hub is busy; for calls that change nothing.

    A Hub that answers too slowly is asked but once.
    """
    for wait in _WAITS:
        try:
            return call()
        except Exception as error:
            pause = pause_after(error, wait)
            if pause is None or isinstance(error, SlowError):
                raise
            time.sleep(pause)
    return call()
