"""What the sweeps share: one server per worker, and their counts at the end of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from tests.faults.scenes import SCENES, Scene
from tests.faults.server import Server
from tests.faults.sweep import Stage, mounted

COUNTED = "points"
Count = Callable[[int, list[str]], None]
"""Takes how many points were met and what was wrong, and fails if anything was."""


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the Hub's cache is for every command of `server`."""
    return tmp_path_factory.mktemp("hf") / "home"


@pytest.fixture(scope="session")
def server(home: Path) -> Iterator[Server]:
    with Server(HF_HOME=str(home)) as started:
        yield started


@pytest.fixture(scope="session", params=SCENES, ids=lambda scene: scene.name)
def stage(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    server: Server,
    home: Path,
) -> Iterator[Stage]:
    """Every scene, once for all tests of it."""
    scene: Scene = request.param
    root = tmp_path_factory.mktemp(scene.name)
    with mounted(root / scene.mount) if scene.mount else nullcontext(True) as is_mounted:
        if not is_mounted:
            pytest.skip("no mounting here")
        yield Stage(scene, root, server, home)


@pytest.fixture
def count(record_property: Callable[[str, object], None]) -> Count:
    def check(points: int, wrong: list[str]) -> None:
        record_property(COUNTED, (points, len(wrong)))
        assert not wrong, "\n".join(wrong[:10])

    return check


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line per sweep, and their sum: with -n no test can print it itself."""
    reports = [r for rows in terminalreporter.stats.values() for r in rows
               if getattr(r, "when", None) == "call"]  # fmt: skip
    found = [(r.nodeid.partition("::")[2], value) for r in reports
             for key, value in r.user_properties if key == COUNTED]  # fmt: skip
    for name, (points, wrong) in sorted(found):
        terminalreporter.write_line(f"{name}: {points} points, {wrong} violations")
    if found:
        points, wrong = (sum(value[i] for _, value in found) for i in (0, 1))
        terminalreporter.write_line(f"all: {points} points, {wrong} violations")
