"""Pushes that arrive at the same moment: nothing is lost, and a clash is said."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from loratool.store.header import build_header
from tests.hub.client import finish, start
from tests.hub_server import Fault, TestHub
from tests.hub_server.state import Tree


@pytest.fixture
def served() -> Iterator[TestHub]:
    with TestHub() as hub:
        hub.state.add_repo("me/x")
        yield hub


def write(path: Path, value: int) -> Path:
    head, _ = build_header([(f"{path.stem}.weight", "U8", (2000,))], {})
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(head + bytes([value]) * 2000)
    return path


def push_at_once(hub: TestHub, home: Path, paths: list[Path]) -> list[tuple[int, str]]:
    """Processes whose first commits all wait for each other, on the same parent."""
    together = threading.Barrier(len(paths), timeout=60)
    hub.state.faults = [Fault("POST .*/commit/", "race", times=len(paths), run=together.wait)]
    running = [
        start(hub.endpoint, home, "push", str(p.relative_to(home)), "me/x", "--force")
        for p in paths
    ]
    return [finish(process) for process in running]


def head_of(hub: TestHub) -> Tree:
    repo = hub.state.repos["me/x"]
    return repo.commits[repo.branches["main"]]


def test_different_files(served: TestHub, tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{n}.safetensors", i) for i, n in enumerate("abc")]
    found = push_at_once(served, tmp_path, paths)
    assert [code for code, _ in found] == [0, 0, 0], found
    assert all(head_of(served)[p.name] == p.read_bytes() for p in paths)
    assert len(served.state.repos["me/x"].commits) == 1 + 3
    assert served.state.requests["commit"] >= 3 + 2  # two of the first three were too late


def test_the_same_file(served: TestHub, tmp_path: Path) -> None:
    paths = [write(tmp_path / n / "a.safetensors", i) for i, n in enumerate("xy")]
    found = push_at_once(served, tmp_path, paths)
    assert sorted(code for code, _ in found) == [0, 7], found
    winner = [code for code, _ in found].index(0)
    assert "LT-712" in found[1 - winner][1] and "a.safetensors" in found[1 - winner][1]
    assert head_of(served)["a.safetensors"] == paths[winner].read_bytes()
    assert len(served.state.repos["me/x"].commits) == 2


def test_the_same_bytes(served: TestHub, tmp_path: Path) -> None:
    paths = [write(tmp_path / n / "a.safetensors", 5) for n in "xy"]
    found = push_at_once(served, tmp_path, paths)
    assert [code for code, _ in found] == [0, 0], found
    assert head_of(served)["a.safetensors"] == paths[0].read_bytes()
    assert len(served.state.repos["me/x"].commits) == 2
