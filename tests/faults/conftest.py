"""What the sweeps share: one server per worker, and their counts at the end of a run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.server import Server

COUNTED = "points"


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the Hub's cache is for every command of `server`."""
    return tmp_path_factory.mktemp("hf") / "home"


@pytest.fixture(scope="session")
def server(home: Path) -> Iterator[Server]:
    with Server(HF_HOME=str(home)) as started:
        yield started


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
