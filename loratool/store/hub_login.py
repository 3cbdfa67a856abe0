"""How this machine stands with the Hub: where it is, where the token lies, whose it is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypedDict

from loratool.errors import LoratoolError, redact
from loratool.report.doctor import Login

_WAIT_S = 3.0
_REJECTED = "LT-707"


class _Who(TypedDict):
    name: str


def login(*, offline: bool = False) -> tuple[Login, bool]:
    """Endpoint and login, and whether the Hub rejects the token.

    The Hub is asked whose token it is, for three seconds at most; never without a token.

    Args:
        offline: ask nobody.
    """
    from huggingface_hub import constants

    from loratool.store.hub import is_offline

    off, place = is_offline(offline), token_place()
    user, why, rejected = None, "no login: hf auth login", False
    if place is not None:
        if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
            why = "not sent: HF_HUB_DISABLE_IMPLICIT_TOKEN is set"
        elif off:
            why = "not asked whose it is: offline"
        else:
            user, why, rejected = _ask()
    return Login(redact(constants.ENDPOINT), off, place, user, why), rejected


def token_place() -> str | None:
    """The variable or the file that the token comes from; None if there is none."""
    from huggingface_hub import constants, get_token

    if not get_token():
        return None
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if os.environ.get(name, "").strip():
            return name
    path = Path(constants.HF_TOKEN_PATH)
    return str(path) if path.is_file() else "the notebook's secrets"


def _ask() -> tuple[str | None, str, bool]:
    """User, or why there is none, and whether the token is rejected."""
    from huggingface_hub import constants

    from loratool.store import hub
    from loratool.store.hub_http import get_json

    try:
        with hub.plain_errors("whoami", None):
            found, _ = get_json(f"{constants.ENDPOINT}/api/whoami-v2", _Who, wait=_WAIT_S / 2)
    except LoratoolError as error:
        return None, f"not known whose it is: {error.what}", error.code == _REJECTED
    return found["name"], "", False
