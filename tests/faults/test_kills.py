"""Kills in real time, with every worker at work: never a wrong output, always the same bytes.

`test_sweep` kills between any two calls; here it is the clock that says when.
"""

from __future__ import annotations

import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import process
from tests.faults.conftest import Count
from tests.faults.scene import Scene, fingerprint, make_merge, make_scene

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")

SEED = 20_260


def kill_at_random(scene: Scene, rng: random.Random, longest_s: float) -> int:
    """Kill a run up to three times in a row, then let it end; returns how many kills hit."""
    scene.reset()
    hits = 0
    for _ in range(3):
        with process.start(scene.words) as child:
            time.sleep(rng.uniform(0, longest_s))
            child.kill()
            _, err = child.communicate()
        if child.returncode != -signal.SIGKILL:
            is_done = fingerprint(scene.output) == scene.expected
            assert child.returncode == 0 or (child.returncode == 5 and is_done), err
            break
        hits += 1
        scene.check_visible()
    scene.check_rerun()
    return hits


def duration(scene: Scene) -> float:
    scene.reset()
    started = time.monotonic()
    assert process.run(scene.words).returncode == 0
    return time.monotonic() - started


@pytest.fixture
def rng() -> Iterator[random.Random]:
    yield random.Random(SEED)


def test_a_few_random_kills(tmp_path: Path, rng: random.Random) -> None:
    scene = make_scene("folder", tmp_path, "--pause", "0.005")
    longest = duration(scene)
    # One may come too late, the more so on a machine that was busier a moment ago.
    assert any(kill_at_random(scene, rng, longest) for _ in range(40))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "kills"), [("folder", 110), ("force", 40), ("file", 20), ("merge", 30)]
)
def test_many_random_kills(
    kind: str, kills: int, tmp_path: Path, rng: random.Random, count: Count
) -> None:
    is_merge = kind == "merge"
    scene = make_merge(tmp_path) if is_merge else make_scene(kind, tmp_path, "--pause", "0.005")
    longest, hits = duration(scene), 0
    while hits < kills:
        hits += kill_at_random(scene, rng, longest)
    count(hits, [])
