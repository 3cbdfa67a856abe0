"""How the Hub's client behaves in the process of a command."""

from __future__ import annotations

import logging
import re
import sys
from typing import Any

from loratool.errors import HubError, redact
from loratool.store.hub_retry import LONGEST_WAIT_S, seconds_asked

SILENCE_S = 60.0
"""A server that says nothing for so long is gone; by itself the client waits for ever."""

_QUERY = re.compile(r"(?<=[\w/])\?[^\s'\"]+")


def prepare_client(*, quiet: bool) -> None:
    """Give the client time limits, discretion, and progress bars if people look at a terminal.

    Args:
        quiet: no progress bars in any case.
    """
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import logging as client_logging
    from huggingface_hub.utils.tqdm import disable_progress_bars

    set_client_factory(_make_client)
    for handler in client_logging.get_logger().handlers:
        handler.addFilter(_without_signatures)
    if quiet or not sys.stderr.isatty():
        disable_progress_bars()


def _make_client() -> Any:
    from huggingface_hub.utils._http import default_client_factory

    client = default_client_factory()
    client.timeout = SILENCE_S
    client.event_hooks["response"].append(_refuse_long_waits)
    return client


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


def _without_signatures(record: logging.LogRecord) -> bool:
    """The client's warnings name addresses; what follows the question mark may be a key."""
    record.msg, record.args = _QUERY.sub("?...", redact(record.getMessage())), ()
    return True
