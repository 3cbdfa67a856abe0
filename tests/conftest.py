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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """``thin(n)``: of a product of parameters every n-th diagonal is quick, the rest slow.

    So each value of each parameter stays in the quick run, as long as another one has n values.
    """
    for item in items:
        mark = item.get_closest_marker("thin")
        if mark is not None and _diagonal(item) % mark.args[0]:
            item.add_marker(pytest.mark.slow)


def _diagonal(item: pytest.Item) -> int:
    places = dict(item.callspec.indices)  # type: ignore[attr-defined]
    for mark in item.iter_markers("parametrize"):
        names = mark.args[0].split(",") if isinstance(mark.args[0], str) else mark.args[0]
        for together in names[1:]:  # parameters that are given as one count once
            places.pop(together.strip())
    return sum(places.values())


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
