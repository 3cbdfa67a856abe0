"""`doctor` beside the test Hub: whose token it is, in a moment or not at all."""

from __future__ import annotations

import time

import pytest

from loratool.store import hub_login
from tests.hub_server import TestHub


def test_the_user_is_named(near: TestHub) -> None:
    found, rejected = hub_login.login()
    assert (found.user, found.token_from, rejected) == ("me", "HF_TOKEN", False)
    assert found.endpoint == near.endpoint


def test_a_dead_token(near: TestHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_nobodynobodynobodynobody")
    found, rejected = hub_login.login()
    assert found.user is None and rejected and "rejected" in found.why


def test_nobody_is_asked(near: TestHub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub_login.login(offline=True)[0].why == "not asked whose it is: offline"
    monkeypatch.setenv("HF_TOKEN", "")
    assert "hf auth login" in hub_login.login()[0].why
    assert not near.state.requests


def test_a_hub_that_is_gone(near: TestHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    started = time.monotonic()
    found, rejected = hub_login.login()
    assert found.user is None and not rejected and "cannot be reached" in found.why
    assert time.monotonic() - started < 30
