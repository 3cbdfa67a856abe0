"""Asking the Hub again after an answer that means "not now"."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_WAITS = (0.5, 2.0)  # seconds before the second and the third attempt
_LONGEST_WAIT = 30.0  # a Retry-After beyond this is reported, not obeyed
_BUSY = (429, 500, 502, 503, 504)


def status_of(error: BaseException) -> int | None:
    """HTTP status of a client's error, None if there was no answer."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def retried(call: Callable[[], T]) -> T:
    """Call up to three times while the Hub is busy; for calls that change nothing."""
    for wait in _WAITS:
        try:
            return call()
        except Exception as error:
            if status_of(error) not in _BUSY:
                raise
            asked = str(error.response.headers.get("Retry-After", ""))  # type: ignore[attr-defined]
            pause = float(asked) if asked.isdigit() else wait
            if pause > _LONGEST_WAIT:
                raise
            time.sleep(pause)
    return call()
