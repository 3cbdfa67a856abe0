"""Any call of any command may fail and any moment may be its last: never a wrong output.

After every fault the outputs are whole or not there, and the same command ends in the same bytes.
`make test` meets a sample of the moments of every scene, `make faults` all of them.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Container
from pathlib import Path

import pytest

from tests.faults.conftest import Count
from tests.faults.scenes import SCENES
from tests.faults.server import Fault, Moment, Server
from tests.faults.sweep import Stage

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="seccomp is for Linux")

SAMPLE, LATE, PAIRS, MANY = 2, 2, 1, 40


def pairs(stage: Stage, rng: random.Random, number: int) -> list[tuple[Fault, Fault]]:
    """A run that is hit, and the one after it hit too: going on is a run like any other."""
    points = stage.points()
    return [(rng.choice(points), rng.choice(points)) for _ in range(number)]


@pytest.mark.thin(2)
def test_some_moments(stage: Stage, count: Count) -> None:
    rng = random.Random(stage.scene.name)
    points = stage.points()
    late = [p for p in points if p.at > len(stage.moments) * 3 // 4]
    chosen = {*rng.sample(points, SAMPLE), *rng.sample(late, LATE), points[-1]}
    hits = [*((p,) for p in sorted(chosen)), *pairs(stage, rng, PAIRS)]
    wrong = [text for faults in hits for text in stage.hit(*faults)]
    count(len(hits) + 1, wrong + stage.hit_and_damage(rng.choice(points), rng))


def test_the_turning_points_of_a_replacement(stage: Stage, count: Count) -> None:
    """All is noted and nothing moved; half of the old output is gone; only its folder is left."""
    if not stage.scene.replaces:
        pytest.skip("replaces nothing")
    noted = last(stage, {"fsync"}, ".journal")
    removed = [n for n, m in enumerate(stage.moments, 1)
               if m.name == "unlink" and Path(m.paths[0]).parent == stage.work / "out"]  # fmt: skip
    hits = [(Fault("INT", noted),)] if noted else []
    hits += [(Fault("kill", last(stage, {"rmdir"}, "")),)]
    if removed:  # a run replaces what the one before it has made
        hits += [(stage.points()[-1], Fault("kill", removed[len(removed) // 2]))]
    if stage.scene.mount:  # all but the marker has moved, and the way back is disturbed
        moved = Fault("kill", last(stage, {"renameat2"}, ""))
        hits += [(moved, Fault("EIO", n)) for n in range(2, 6)]
    count(len(hits), [text for faults in hits for text in stage.hit(*faults)])


def last(stage: Stage, names: Container[str], end: str) -> int:
    """The last moment of a name at a path that ends so; 0 without one."""
    found = [n for n, m in enumerate(stage.moments, 1)
             if m.name in names and m.paths and m.paths[0].endswith(end)]  # fmt: skip
    return max(found, default=0)


@pytest.mark.slow
def test_every_moment(stage: Stage, count: Count) -> None:
    points = stage.points()
    count(len(points), [text for point in points for text in stage.hit(point)])


@pytest.mark.slow
def test_many_pairs_of_moments(stage: Stage, count: Count) -> None:
    hits = pairs(stage, random.Random(stage.scene.name), MANY)
    count(len(hits), [text for faults in hits for text in stage.hit(*faults)])


@pytest.mark.slow
def test_damaged_notes(stage: Stage, count: Count) -> None:
    """What a run notes for the next one may be damaged too: by a disk, or by a power cut."""
    rng = random.Random(stage.scene.name)
    points = rng.choices(stage.points(), k=MANY)
    count(MANY, [text for point in points for text in stage.hit_and_damage(point, rng)])


# ------------------------------------------------------------------------- the check itself


@pytest.fixture
def merge(tmp_path: Path, server: Server, home: Path) -> Stage:
    return Stage(SCENES[0], tmp_path, server, home)


def test_moments_are_where_the_run_changes_something(merge: Stage) -> None:
    names = {moment.name for moment in merge.moments}
    assert {"mkdir", "openat", "write", "pwrite64", "fsync", "rename", "unlink"} <= names
    assert merge.moments[-2].name == "rename"
    assert merge.moments[-2].paths[1] == str(merge.work / "out")


def test_each_fault_does_what_it_says(merge: Stage, server: Server, tmp_path: Path) -> None:
    def run(kind: str, at: int) -> tuple[int | None, list[Moment]]:
        merge.reset()
        found = server.run(merge.scene.words, cwd=tmp_path, fault=Fault(kind, at), trace=True)
        return found.code, found.moments

    at = next(i for i, m in enumerate(merge.moments, 1) if m.name == "pwrite64")
    assert (run("kill", at)[0], run("EIO", at)[0], run("ENOSPC", at)[0]) == (-9, 6, 6)
    code, moments = run("short", at)
    size = merge.moments[at - 1].size
    assert code == 0 and moments[at].size == size - size // 2
    assert run("full", len(merge.moments))[0] == 6  # the last sync, and none comes after it
    assert run("INT", at)[0] == 130


def test_the_check_sees_what_is_wrong(merge: Stage, tmp_path: Path) -> None:
    """A product that writes in place, or leaves something, would not pass."""
    out, fault = tmp_path / "work" / "out", Fault("kill", 1)

    def spoil(change: Callable[[], object]) -> list[str]:
        with pytest.MonkeyPatch.context() as patch:
            run = merge.run
            patch.setattr(merge, "run", lambda fault: (run(fault), change())[0])
            return merge.hit(fault)

    assert merge.hit(fault) == []
    assert "wrong at work/out" in spoil(lambda: (out.mkdir(exist_ok=True), (out / "x").touch()))[0]
    assert "left behind" in spoil(lambda: (out.parent / "tmp").touch())[0]
    assert "foreign files" in spoil(lambda: (out.parent / "notes.txt").unlink(missing_ok=True))[0]
    assert "an input changed" in spoil(lambda: (tmp_path / "in" / "thesis.txt").write_text("?"))[0]
