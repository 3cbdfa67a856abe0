"""Shared fixtures."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from operator import is_
from pathlib import Path

import pytest

DATA = Path(__file__).parent / "data"
_ROW = type(pytest.param())
SAVED_FROM_WAITING = ("cli", "contract", "docs", "oracle")

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
    """Sum of the places of its parameters in their lists; those that are given as one count once.

    `callspec.indices` tells something else: the place of the whole among all tests of the function.
    """
    found = dict(item.callspec.params)  # type: ignore[attr-defined]
    places = 0
    for mark in item.iter_markers("parametrize"):
        names = mark.args[0].split(",") if isinstance(mark.args[0], str) else mark.args[0]
        want = [found.pop(name.strip()) for name in names]
        for place, row in enumerate(mark.args[1]):
            have = row.values if isinstance(row, _ROW) else row if len(want) > 1 else (row,)
            if all(map(is_, have, want)):
                places += place
                break
        else:
            raise ValueError(f"parameters of {item.name} are no list")
    return places + sum(item.callspec.indices[name] for name in found)  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def quick_disk(request: pytest.FixtureRequest) -> Iterator[None]:
    """Results are the same before they are on the disk: what is synced when tests/faults sees."""
    real = os.fsync
    if request.path.parent.name in SAVED_FROM_WAITING:
        os.fsync = lambda _: None  # type: ignore[assignment]
    yield
    os.fsync = real


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
