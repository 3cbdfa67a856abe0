"""Long work is watched: first the plan, then what is at work, how much is done, and the end."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import loratool as lt
from loratool.cli import progress, recipe
from loratool.ops.turns import Turns
from tests.make import with_whole

from .conftest import Run

Call = Callable[..., Any]
PLANNED: dict[str, Call] = {
    "merge": lambda **w: lt.merge(["style"], base="base", output="o", **w),
    "combine": lambda **w: lt.combine(["style", "sql"], output="o", **w),
    "subtract": lambda **w: lt.subtract(["style"], merged="m", output="o", **w),
    "swap": lambda **w: lt.swap("style", "sql", merged="m", output="o", **w),
    "split": lambda **w: lt.split("whole", base="base", output="o", **w),
    "extract": lambda **w: lt.extract("tuned", base="base", output="o", rank=2, **w),
    "compress": lambda **w: lt.compress(["style", "sql"], output="o/", rank=2, **w),
    "compress to a size": lambda **w: lt.compress("style", output="o", size="40kB", **w),
    "convert": lambda **w: lt.convert(["style", "sql"], to="kohya", output="o/", **w),
    "rescale": lambda **w: lt.rescale(["style", "sql"], 0.3, output="o/", **w),
}
WATCHED: dict[str, Call] = {
    **PLANNED,
    "verify": lambda **w: lt.verify("m", base="base", adapters=["style"], **w),
    "inspect": lambda **w: lt.inspect(".", **w),
    "inspect --base": lambda **w: lt.inspect("style", base="base", **w),
    "inspect --spectrum": lambda **w: lt.inspect("style", spectrum=True, **w),
    "inspect --risk": lambda **w: lt.inspect("style", risk=True, **w),
    "inspect processes": lambda **w: lt.inspect("style", spectrum=True, executor="processes", **w),
    "compare": lambda **w: lt.compare(["style", "sql"], **w),
    "compare three": lambda **w: lt.compare(["style", "sql", "style"], **w),
}
IN_MEMORY = {"inspect --spectrum", "inspect --risk", "inspect processes", "compare",
             "compare three", "combine"}  # fmt: skip
"""Commands that read nothing but factors: they count the bytes of these, module by module."""
TENSOR_BY_TENSOR = {"convert", "rescale"}

RECIPE = """\
steps:
  - compare: {adapters: [style, sql]}
  - merge: {adapters: [style], base: base, output: o}
  - inspect: {source: "."}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "toy"
    lt.demo(folder)
    lt.merge([folder / "style"], base=folder / "base", output=folder / "m")
    with_whole(folder / "style", folder / "whole", "model.norm.weight", folder / "base")
    return folder


@pytest.fixture
def toy(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path / "toy")
    monkeypatch.chdir(tmp_path / "toy")
    return tmp_path / "toy"


@pytest.mark.parametrize("name", WATCHED)
def test_what_is_told_and_when(name: str, toy: Path) -> None:
    told: list[tuple[str, Any]] = []
    watch: dict[str, Any] = {
        "on_work": lambda name: told.append(("work", name)),
        "progress": lambda done, total: told.append(("done", (done, total))),
    }
    if name in PLANNED:
        watch["on_plan"] = lambda report: told.append(("plan", report))
    report = WATCHED[name](**watch)
    kinds = [kind for kind, _ in told]
    assert kinds[: 1 + (name in PLANNED)] == ["plan", "work"][name not in PLANNED :]
    assert kinds.count("plan") == (name in PLANNED)
    if name in PLANNED and hasattr(told[0][1], "to_json"):
        assert type(told[0][1]) is type(report)
    counts = [value for kind, value in told if kind == "done"]
    dones, totals = [c[0] for c in counts], {c[1] for c in counts}
    assert dones == sorted(dones) and len(totals) == 1 and dones[-1] == totals.pop(), counts
    if name in IN_MEMORY:
        assert len(set(dones) - {0}) == 14
    if name in TENSOR_BY_TENSOR:
        assert len(set(dones) - {0}) >= 2 * 28  # two files, 14 pairs of factors in each


def test_each_step_of_a_recipe_is_watched(toy: Path) -> None:
    Path("r.yaml").write_text(RECIPE)
    told: list[tuple[int, int]] = []
    ends: list[list[tuple[int, int]]] = []
    names: list[str] = []

    def on_step(step: Any, report: Any) -> None:
        if report is not None:
            ends.append(told.copy())
        told.clear()

    lt.run("r.yaml", on_step=on_step, progress=lambda *n: told.append(n), on_work=names.append)
    assert len(ends) == 3 and all(counts[-1][0] == counts[-1][1] for counts in ends)
    assert len(names) > 3 * 14 - 14


def test_each_step_of_a_recipe_has_a_bar(
    toy: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of its own: it is taken away before the step is told, and before an error is."""
    told: list[str] = []

    @contextmanager
    def show(*, quiet: bool, unit: str) -> Iterator[dict[str, Any]]:
        told.append(f"begin {unit}")
        try:
            yield {} if quiet else {"progress": lambda *n: told.append("shown"), "on_work": len}
        finally:
            told.append("end")

    monkeypatch.setattr(recipe, "show_progress", show)
    Path("r.yaml").write_text(RECIPE)
    assert run("run", "r.yaml").code == 0
    assert [t for t in told if t != "shown"] == [
        "begin bytes", "end", "begin bytes", "end", "begin files", "end"]  # fmt: skip
    assert told.count("shown") > 20
    told.clear()
    assert run("run", "r.yaml", "-q").code == 5  # the merge is there
    assert told == ["begin bytes", "end", "begin bytes", "end"]


def test_a_dry_run_is_its_own_plan(toy: Path) -> None:
    for name, words in (("merge", {"base": "base"}), ("extract", {"base": "base", "rank": 2})):
        first: Any = ["style"] if name == "merge" else "tuned"
        getattr(lt, name)(first, **words, output="o", dry_run=True, on_plan=pytest.fail)


def test_turns() -> None:
    told: list[Any] = []
    turns = Turns(lambda *n: told.append(n), told.append, [10, 30])
    for thing in turns.each(["a", "b"], str.upper):
        turns.part(0, 0.5)(1, 2)
        turns.part(0.5, 1)(0, 2)
        turns.part(0, 0.5)(0, 2)  # once more: no step back
        assert thing in "ab"
    assert told == ["A (1 of 2)", (2, 40), (5, 40), (5, 40), (10, 40),
                    "B (2 of 2)", (17, 40), (25, 40), (25, 40), (40, 40)]  # fmt: skip
    assert list(Turns(None, None, [1]).each(["x"], str)) == ["x"]


def test_plain_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with progress.show_progress(quiet=False, unit="files") as watchers:
        for done in range(6):
            watchers["on_work"](f"loras/\x1b{done}.safetensors")
            now += 3.0
            watchers["progress"](done + 1, 6)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "2 of 6 files, 0.3/s, 12 s left: loras/\\x1b1.safetensors"
    assert len(lines) == 2  # not after each file, and not at the end


def test_quiet_is_quiet(toy: Path, run: Run) -> None:
    done = run("compress", "style", "--rank", "2", "-o", "o", "-q")
    assert (done.out, done.err) == ("o\n", "")
    assert "plan" not in run("compress", "style", "--rank", "2", "-o", "p", "--json").json


SLOW = """
import sys, time
from loratool.cli import progress, main
progress._BAR_AFTER_S = progress._Shown.every = 0
main(sys.argv[1:])
"""


def on_terminal(*words: str) -> str:
    """What a command writes to a terminal, both streams together, a minute at most."""
    pid, fd = pty.fork()
    if pid == 0:
        os.environ |= {"TERM": "xterm", "COLUMNS": "130"}
        os.execv(sys.executable, [sys.executable, "-c", SLOW, *words])
    out, end = b"", time.monotonic() + 60
    try:
        while time.monotonic() < end:
            if select.select([fd], [], [], 0.5)[0]:
                try:
                    part = os.read(fd, 1 << 16)
                except OSError:  # the end, on Linux
                    break
                out += part
        else:
            os.kill(pid, 9)
    finally:
        os.close(fd)
        os.waitpid(pid, 0)
    return out.decode()


@pytest.mark.skipif(os.name == "nt", reason="no terminals to open")
def test_a_person_sees_the_plan_before_the_bar(toy: Path) -> None:
    text = on_terminal("merge", "style", "--base", "base", "-o", "o")
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    places = [plain.find(word) for word in ("Merging", "plan ", "memory ≤", "━", "loss ", "wrote ")]
    assert -1 not in places and places == sorted(places), plain
    bar = plain[places[3] : places[4]]
    assert re.search(r"B/s", bar) and re.search(r"\d:\d\d:\d\d", bar) and "layers." in bar
    assert plain.count("plan ") == 1
