"""No bug from data: every kind of file, mutated, and the commands that read it.

`make test` runs the first 60 cases of each kind, `make faults` 2,000, `make fuzz` 20,000.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults import mutations
from tests.faults.conftest import COUNTED
from tests.faults.mutations import KINDS, Found, Kind
from tests.faults.server import Server
from tests.faults.site_of_kinds import LIKE_OURS
from tests.hub.client import TOKEN
from tests.hub_server import TestHub

QUICK = 60
MANY = int(os.environ.get("MUTATIONS", "2000"))
BATCH = 60


@pytest.fixture(scope="module")
def hub() -> Iterator[TestHub]:
    with TestHub() as started:
        yield started


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory, server: Server) -> Callable[[int], Path]:
    """Makes the files for so many cases: with all samples where they are many."""
    made: dict[bool, Path] = {}

    def site(count: int) -> Path:
        is_quick = count <= QUICK
        if is_quick not in made:
            made[is_quick] = tmp_path_factory.mktemp("mutations")
            samples = LIKE_OURS if is_quick else None
            server.call("tests.faults.site_of_kinds:make_site", str(made[is_quick]), samples)
        return made[is_quick]

    return site


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    "count",
    [pytest.param(QUICK, id="quick"), pytest.param(MANY, id="all", marks=pytest.mark.slow)],
)
def test_mutations(
    name: str,
    count: int,
    sites: Callable[[int], Path],
    server: Server,
    hub: TestHub,
    record_property: Callable[[str, object], None],
) -> None:
    found = Found()
    env = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
    for start in range(0, count, BATCH):
        size = min(BATCH, count - start)
        part = server.call(
            "tests.faults.mutations:meet", name, start, size, str(sites(count)), **env
        )
        if part is None:
            found.wrong.append(f"{name}: one of {start} to {start + size} hangs")
            continue
        found.wrong += part["wrong"]
        found.codes += Counter(part["codes"])
        found.slowest = max(found.slowest, part["slowest"])
        found.peak = max(found.peak, part["peak"])
    print(f"{name}: {dict(found.codes)}, {found.slowest:.2f} s, {found.peak / 1e6:.0f} MB")
    record_property(COUNTED, (count, len(found.wrong)))
    assert not found.wrong, "\n".join(found.wrong[:10])
    assert found.codes["0"] and len(found.codes) > 1, "the mutations reach only few checks"


def spin(_: object) -> int:
    end = time.process_time() + 0.1
    while time.process_time() < end:
        pass
    return 3


def keep(_: object) -> int:
    Path("work/out").mkdir()
    return 3


def hang(_: object) -> int:
    while True:
        pass


@pytest.mark.parametrize(
    ("run", "said"),
    [(lambda _: 1, "exit 1"), (lambda _: 7, "exit 7"), (spin, " s: "), (hang, "exit None"),
     (keep, "an output"), (lambda _: 3, " MB: ")],
)  # fmt: skip
def test_what_is_wrong_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[[object], int], said: str
) -> None:
    """A bug, a foreign exit code, a slow one, one without end, an output, much memory."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(KINDS, "planted", Kind(("in/x",), lambda d, _: d + b"y", ("inspect x",)))
    monkeypatch.setattr(mutations, "CPU_S", 0.05)
    monkeypatch.setattr(mutations, "PEAK_BYTES", 8_000_000)
    monkeypatch.setattr(mutations, "peak_bytes", iter((0, 9_000_000)).__next__)
    monkeypatch.setattr(mutations.cli, "run", run)
    found = Found()
    mutations.meet_one("planted", 0, found)
    assert any(said in line for line in found.wrong), found.wrong
    assert Path("in/x").read_bytes() == b"x"
