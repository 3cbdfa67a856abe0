"""No bug from data: every kind of file, mutated, and the commands that read it.

`make test` runs the first 60 cases of each kind, `make faults` 2,000, `make fuzz` 20,000.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.conftest import COUNTED
from tests.faults.mutations import KINDS
from tests.faults.server import Server
from tests.hub_server import TestHub

QUICK = 60
MANY = int(os.environ.get("MUTATIONS", "2000"))
BATCH = 30


@pytest.fixture(scope="module")
def hub() -> Iterator[TestHub]:
    with TestHub() as started:
        yield started


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, server: Server) -> Path:
    made = tmp_path_factory.mktemp("mutations")
    server.call("tests.faults.site_of_kinds:make_site", str(made))
    return made


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    "count",
    [pytest.param(QUICK, id="quick"), pytest.param(MANY, id="all", marks=pytest.mark.slow)],
)
def test_mutations(
    name: str, count: int, site: Path, server: Server, hub: TestHub, home: Path,
    record_property: pytest.FixtureRequest,
) -> None:  # fmt: skip
    wrong: list[str] = []
    codes: Counter[str] = Counter()
    slowest = peak = 0
    for start in range(0, count, BATCH):
        size = min(BATCH, count - start)
        env = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_x", "HF_HUB_OFFLINE": "0"}
        found = server.call("tests.faults.mutations:meet", name, start, size, str(site), **env)
        if found is None:
            wrong.append(f"{name}: one of {start} to {start + size} hangs")
            continue
        wrong += found["wrong"]
        codes.update(found["codes"])
        slowest, peak = max(slowest, found["slowest"]), max(peak, found["peak"])
    print(f"{name}: {dict(codes)}, {slowest:.2f} s, {peak / 1e6:.0f} MB")
    record_property(COUNTED, (count, len(wrong)))
    assert not wrong, "\n".join(wrong[:10])
    assert len(codes) > 1, "the mutations reach only few checks"
