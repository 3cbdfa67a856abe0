"""Any call may fail and any moment may be the last: never a wrong output, always the same bytes.

A quick share runs with `make test`; `make faults` runs every point and prints the counts.
"""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.faults import strace
from tests.faults.scene import Scene, fingerprint, write_model
from tests.make import save_adapter

pytestmark = pytest.mark.skipif(not Path("/proc").is_dir(), reason="strace is for Linux")

KINDS = ("folder", "force", "file")
SEED = 20_260


def make_scene(kind: str, root: Path, *options: str) -> Scene:
    """A copy of a small model into a new folder, over an earlier output, or into one file."""
    base = write_model(root / "in" / "base")
    if kind == "file":
        single = root / "in" / "one.safetensors"
        shutil.copy(base / "model-00001-of-00003.safetensors", single)
        command = [*strace.COPY, single, *options]
        return Scene(command, root / "in", root / "work", "out.safetensors")
    command = [*strace.COPY, base, *options]
    if kind == "folder":
        return Scene(command, root / "in", root / "work", "out")
    earlier = root / "earlier"
    done = strace.run([*strace.COPY, write_model(root / "other", seed=5), earlier])
    assert done.returncode == 0, done.stderr
    return Scene(command, root / "in", root / "work", "out", ("--force",), earlier)


def make_merge(root: Path) -> Scene:
    """A real merge, one worker, so that the k-th call is always the same one."""
    base = write_model(root / "in" / "base")
    module, size = "layers.2.proj", (64, 128)
    factors = {module: (torch.ones(2, size[1]), torch.full((size[0], 2), 0.01))}
    adapter = save_adapter(root / "in" / "adapter", factors)
    command = [*strace.MERGE, adapter, "--base", base, "--threads", 1]
    return Scene(command, root / "in", root / "work", "out")


def hit(scene: Scene, call: str, when: int, fault: str, log: Path) -> bool:
    """One crash point; True if the rerun had to work."""
    scene.reset()
    done = strace.run_hit(scene.words, call, when, fault, log)
    where = f"{call} {when} {fault}: exit {done.returncode}, {done.stderr}"
    if "KILL" in fault:
        assert done.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL), where
    else:  # an error in our words, or a call that may fail (looking for leftovers, a fallback)
        assert done.returncode in (0, 6), where
        assert "Traceback" not in done.stderr, where
    try:
        scene.check_visible()
        return scene.check_rerun()
    except AssertionError as error:
        raise AssertionError(f"after {where}: {error}") from error


@pytest.mark.parametrize("kind", KINDS)
def test_some_crash_points(kind: str, tmp_path: Path) -> None:
    scene, log = make_scene(kind, tmp_path), tmp_path / "log"
    points = [(*p, f) for p in scene.points(log) for f in strace.FAULTS]
    for call, when, fault in random.Random(SEED).sample(points, 9):
        hit(scene, call, when, fault, log)


def test_a_crash_point_of_a_merge(tmp_path: Path) -> None:
    scene, log = make_merge(tmp_path), tmp_path / "log"
    renames = [p for p in scene.points(log) if p[0] == "rename"]
    hit(scene, *renames[-1], "error=EIO", log)  # kills cost far more: make faults


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_crash_point(kind: str, tmp_path: Path) -> None:
    scene, log = make_scene(kind, tmp_path), tmp_path / "log"
    points = [(*p, f) for p in scene.points(log) for f in strace.FAULTS]
    redone = sum(hit(scene, *point, log) for point in points)
    print(f"\n{kind}: {len(points)} crash points, 0 violations, {redone} reruns byte-equal")
    assert len(points) > 60


@pytest.mark.slow
def test_crash_points_of_a_merge(tmp_path: Path) -> None:
    scene, log = make_merge(tmp_path), tmp_path / "log"
    points = [(*p, f) for p in scene.points(log) for f in strace.FAULTS]
    chosen = random.Random(SEED).sample(points, 30)
    redone = sum(hit(scene, *point, log) for point in chosen)
    print(f"\nmerge: {len(chosen)} of {len(points)} crash points, {redone} reruns byte-equal")


def kill_at_random(scene: Scene, rng: random.Random, longest_s: float) -> int:
    """Kill a run up to three times in a row, then let it end; returns how many kills hit."""
    scene.reset()
    hits = 0
    for _ in range(3):
        with strace.start(scene.words) as child:
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
    assert strace.run(scene.words).returncode == 0
    return time.monotonic() - started


@pytest.fixture
def rng() -> Iterator[random.Random]:
    yield random.Random(SEED)


def test_a_few_random_kills(tmp_path: Path, rng: random.Random) -> None:
    scene = make_scene("folder", tmp_path, "--pause", "0.005")
    longest = duration(scene)
    assert sum(kill_at_random(scene, rng, longest) for _ in range(3)) > 0


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "kills"), [("folder", 110), ("force", 40), ("file", 20)])
def test_many_random_kills(kind: str, kills: int, tmp_path: Path, rng: random.Random) -> None:
    scene = make_scene(kind, tmp_path, "--pause", "0.005")
    longest, hits, trials = duration(scene), 0, 0
    while hits < kills:
        hits += kill_at_random(scene, rng, longest)
        trials += 1
    print(f"\n{kind}: {hits} kills in {trials} trials, 0 violations, all byte-equal at the end")


@pytest.mark.slow
def test_random_kills_of_a_merge(tmp_path: Path, rng: random.Random) -> None:
    scene = make_merge(tmp_path)
    longest, hits, trials = duration(scene), 0, 0
    while hits < 30:
        hits += kill_at_random(scene, rng, longest)
        trials += 1
    print(f"\nmerge: {hits} kills in {trials} trials, 0 violations, all byte-equal at the end")
