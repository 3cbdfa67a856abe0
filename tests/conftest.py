"""Shared fixtures."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

DATA = Path(__file__).parent / "data"

for _name in ("SIGINT", "SIGHUP"):
    # A suite that nohup or a shell's `&` started would pass "ignored" on to every program it runs;
    # a signal that is handled here has its default there.
    _number = getattr(signal, _name, None)
    if _number is not None and signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, lambda *_: None)


@pytest.fixture
def data() -> Path:
    """Folder of the sample adapters."""
    return DATA


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a folder with the small files of the demo."""
    from loratool.delta.toy import toy_files

    for name, data in toy_files():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    monkeypatch.chdir(tmp_path)
    return tmp_path
