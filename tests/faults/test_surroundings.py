"""Whatever lies at and around an output: what is not loratool's outlives every command.

The worlds are made by Hypothesis (`tests.faults.surroundings`).  Refusing is not enough: where
nothing is in the way the command must work.
"""

from __future__ import annotations

import hashlib
import shutil
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.faults.conftest import Count
from tests.faults.server import Server
from tests.faults.site import BOTH, COMMANDS, Library
from tests.faults.surroundings import Plan, alone, build, inputs, must_work, plans, run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the server needs seccomp")

CODES = {0, 2, 3, 4, 5, 6, 9}
QUICK = settings(
    max_examples=100, deadline=None, derandomize=True, database=None,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
Snapshot = dict[Path, tuple[int, int, str]]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory, server: Server, home: Path) -> Library:
    return Library(tmp_path_factory.mktemp("library"), server, home)


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ground")


def snapshot(root: Path) -> Snapshot:
    """Path -> kind, inode and content of everything but folders."""
    found = {}
    for path in root.rglob("*"):
        info = path.lstat()
        if stat.S_ISLNK(info.st_mode):
            content = str(path.readlink())
        elif stat.S_ISREG(info.st_mode):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            content = ""
        if not stat.S_ISDIR(info.st_mode):
            found[path] = (stat.S_IFMT(info.st_mode), info.st_ino, content)
    return found


def files(place: Path) -> list[str]:
    """Content of the files of an output."""
    found = [place] if place.is_file() else sorted(place.rglob("*"))
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in found if path.is_file()]


def check(plan: Plan, library: Library, ground: Path) -> None:
    root = ground / "root"
    try:
        site = build(plan, root, library)
        before = snapshot(root)
        done = run(plan, site)
        after = snapshot(root)
        said = f"exit {done.code} {done.err} {plan}"
        lost = [str(p.relative_to(root)) for p, what in before.items()
                if p not in site.own and after.get(p) != what]  # fmt: skip
        assert not lost, f"not loratool's and not there any more: {lost}, {said}"
        new = after.keys() - before.keys()
        inside = [p for p in new if any(p.is_relative_to(place) for place in inputs(site))]
        assert not inside, f"new in an input: {inside}, {said}"
        assert done.code in CODES and "Traceback" not in done.err, said
        assert "LT-001" not in done.err, said
        if done.code == 0 and Path(str(site.where["style"])).name == "style":  # provenance has it
            for place in site.places:
                assert files(place) == files(site.same(place)), f"{place}, {said}"
        elif done.code not in (0, 6) and plan.command not in ("run", "demo"):
            # 6 keeps finished work, and the first steps of those may have worked
            assert not new or plan.old == "marked", f"a refusal left {new}, {said}"
        if must_work(plan, site):
            assert done.code == 0, said
    finally:
        for folder in filter(Path.is_dir, root.rglob("*")):
            folder.chmod(0o755)
            if folder.is_mount():
                subprocess.run(["umount", str(folder)], check=True)
        shutil.rmtree(root)


@QUICK
@given(plan=plans())
def test_what_is_not_ours_stays(plan: Plan, library: Library, ground: Path) -> None:
    check(plan, library, ground)


def test_one_thing_at_a_time(library: Library, ground: Path) -> None:
    """Everything that a world is made of, each with some command that replaces."""
    able = [name for name, command in sorted(COMMANDS.items()) if command.options]
    for number, plan in enumerate(alone("", BOTH[:1])):
        check(replace(plan, command=able[number % len(able)]), library, ground)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_one_thing_at_a_time_for_every_command(
    command: str, library: Library, ground: Path, count: Count
) -> None:
    found = alone(command, ())
    if COMMANDS[command].options:
        found += alone(command, BOTH[:1])
    for plan in found:
        check(plan, library, ground)
    count(len(found), [])


@pytest.mark.slow
@pytest.mark.parametrize("part", range(5))
def test_what_is_not_ours_stays_in_many_worlds(
    part: int, library: Library, ground: Path, count: Count
) -> None:
    @settings(QUICK, max_examples=1000, derandomize=False)
    @given(plan=plans())
    def examine(plan: Plan) -> None:
        check(plan, library, ground)

    examine()
    count(1000, [])
