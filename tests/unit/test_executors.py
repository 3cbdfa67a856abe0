"""One plan, several executors: the same bytes, also if a worker is killed on the way."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import loratool as lt
from loratool import wire
from loratool.adapter import TensorRef
from loratool.engine import grid, run
from loratool.engine.executors import find_executor, processes
from loratool.engine.executors.whole_steps import Order
from loratool.engine.kernel import Env
from loratool.engine.run import execute, in_turn
from loratool.engine.sink import CheckpointSink
from loratool.engine.step import StepWork
from loratool.errors import BugError, DiskError, NumericError, UsageError
from loratool.plan import Plan
from loratool.store import reader
from loratool.store.disk import lies_in_memory
from loratool.store.reader import FileReader
from tests.make import randn, random_factors, save_adapter, save_checkpoint

SHAPES = {f"layers.{i}.{name}": (96, 64) for i in range(3) for name in ("q_proj", "up_proj")}
COMMANDS = ("merge", "extract", "combine", "compress")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("inputs")
    tensors = {f"model.{k}.weight": randn(*s, seed=i) for i, (k, s) in enumerate(SHAPES.items())}
    save_checkpoint(top / "base", {**tensors, "model.norm.weight": randn(64, seed=9)}, shards=2)
    for seed in (1, 2):
        factors = random_factors({f"model.{k}": s for k, s in SHAPES.items()}, rank=4, seed=seed)
        save_adapter(top / f"a{seed}", factors)
    first = {f"model.{k}": s for k, s in list(SHAPES.items())[:2]}
    save_adapter(top / "a0", random_factors(first, rank=4, seed=3))
    lt.merge([top / "a1"], base=top / "base", output=top / "tuned")
    return top


def call(command: str, top: Path, out: Path | str, executor: Any = "threads", **how: Any) -> Any:
    how = {"output": out, "threads": 2, "executor": executor, **how}
    if command == "merge":
        return lt.merge([top / "a1", f"{top / 'a2'}:0.5"], base=top / "base", **how)
    if command == "extract":
        return lt.extract(top / "tuned", base=top / "base", rank=3, **how)
    if command == "file":  # its header says what the file holds, once that is known
        Path(out).mkdir()
        file = top / "base" / "model-00001-of-00002.safetensors"
        return lt.merge([top / "a0"], base=file, **{**how, "output": Path(out) / "m.safetensors"})
    if command == "combine":
        return lt.combine([top / "a1", f"{top / 'a2'}:0.5"], method="ties", **how)
    return lt.compress(top / "a1", energy=0.9, **how)


def long_step(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base, two adapters and a fine-tune of one tensor, whose step takes several pieces."""
    shape = {"model.layers.0.up_proj": (1700, 1000)}  # four blocks
    save_checkpoint(top / "base", {f"{k}.weight": randn(*s, seed=1) for k, s in shape.items()})
    for seed in (1, 2):
        save_adapter(top / f"a{seed}", random_factors(shape, rank=4, seed=seed))
    lt.merge([top / "a1"], base=top / "base", output=top / "tuned")
    monkeypatch.setattr(grid, "CPU_CHUNK_BYTES", 1 << 20)


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(folder.rglob("*")) if p.is_file()}  # fmt: skip


@pytest.mark.parametrize("command", [*COMMANDS, "file"])
def test_processes_write_the_same(
    command: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call(command, inputs, tmp_path / "threads")
    started = watched(monkeypatch)
    call(command, inputs, tmp_path / "processes", "processes")
    assert len(started) >= 2
    assert contents(tmp_path / "processes") == contents(tmp_path / "threads")


@pytest.mark.parametrize("executor", ["threads", "processes"])
def test_shards_in_turn_are_the_same(
    executor: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in memory, where threads that write into one file wait for each other."""
    call("merge", inputs, tmp_path / "want", executor)
    order: list[int] = []
    begin = CheckpointSink.out
    monkeypatch.setattr(CheckpointSink, "files_at_once", 2)
    monkeypatch.setattr(
        CheckpointSink, "out", lambda self, step: order.append(step.shard) or begin(self, step)
    )
    call("merge", inputs, tmp_path / "made", executor)
    assert order[:4] == [0, 1, 0, 1]
    assert contents(tmp_path / "made") == contents(tmp_path / "want")


@given(st.lists(st.integers(0, 5), max_size=40), st.integers(1, 4))
def test_in_turn(shards: list[int], width: int) -> None:
    order = list(in_turn(shards, width))
    assert sorted(order) == list(range(len(shards)))
    for shard in set(shards):
        assert [i for i in order if shards[i] == shard] == sorted(
            i for i in order if shards[i] == shard
        )
    for at in range(len(order)):
        begun = {shards[i] for i in order[:at]} & {shards[i] for i in order[at:]}
        assert len(begun) <= width


@pytest.mark.skipif(not Path("/proc/self/mountinfo").exists(), reason="Linux")
def test_memory_is_told_from_a_disk(tmp_path: Path) -> None:
    kinds = {
        line.split()[4]: line.split()[line.split().index("-") + 1]
        for line in Path("/proc/self/mountinfo").read_text().splitlines()
    }
    for folder in ("/dev/shm", "/proc"):
        if folder in kinds:
            assert lies_in_memory(Path(folder)) == (kinds[folder] == "tmpfs")
    assert not lies_in_memory(tmp_path / "missing")


def test_processes_measure_the_same(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results that are no files: tensors, tables of inner products."""

    def measured(executor: Any = "threads") -> list[Any]:
        compared = lt.compare([inputs / "a1", inputs / "a2"], threads=1, executor=executor)
        found = lt.inspect(inputs / "a1", risk=True, threads=1, executor=executor)
        reports = [r.to_json() for r in (compared, found)]
        return [{k: v for k, v in r.items() if k != "seconds"} for r in reports]

    want = measured()
    started = watched(monkeypatch)
    assert measured("processes") == want
    assert len(started) == 2


@pytest.mark.thin(2)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_killed_worker_is_replaced(
    command: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at the second step that it is given, before it can have done it."""
    call(command, inputs, tmp_path / "threads")
    started = watched(monkeypatch)
    killed = kill_at(monkeypatch, {2: 1})
    call(command, inputs, tmp_path / "processes", "processes")
    assert killed and len(started) >= 3
    assert contents(tmp_path / "processes") == contents(tmp_path / "threads")


class Fatal(FileReader):
    """Kills its process in the second piece of a step, once: a file says whether it still may."""

    reads = 0

    def is_later(self, start: int) -> bool:
        return start > 0

    def read_into(self, ref: TensorRef, start: int, buffer: memoryview) -> None:
        if self.is_later(start) and multiprocessing.parent_process() is not None:
            Fatal.reads += 1
            flag = Path(os.environ["FATAL"])
            if Fatal.reads == 2 and flag.exists():
                flag.unlink()
                os.kill(os.getpid(), signal.SIGKILL)
        super().read_into(ref, start, buffer)


class FatalInModule(Fatal):
    """The same in the second tensor of a module: those are read whole."""

    def is_later(self, start: int) -> bool:
        return True


@pytest.mark.thin(2)
@pytest.mark.parametrize(
    ("command", "fatal"),
    [("merge", Fatal), ("extract", Fatal), ("combine", FatalInModule), ("compress", FatalInModule)],
)
def test_killed_in_the_middle_of_a_step(
    command: str, fatal: type[Fatal], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Part of the tensor is written by then, or part of the module read."""
    long_step(tmp_path, monkeypatch)
    call(command, tmp_path, tmp_path / "threads")
    monkeypatch.setattr(reader, "FileReader", fatal)
    flag = tmp_path / "flag"
    monkeypatch.setenv("FATAL", str(flag))
    flag.touch()
    call(command, tmp_path, tmp_path / "processes", "processes")
    assert not flag.exists()
    assert contents(tmp_path / "processes") == contents(tmp_path / "threads")


class Hanging(FileReader):
    """Never reads in a worker, which says so."""

    def read_into(self, ref: TensorRef, start: int, buffer: memoryview) -> None:
        if multiprocessing.parent_process() is not None:
            os.write(1, b"%d\n" % os.getpid())
            time.sleep(600)
        super().read_into(ref, start, buffer)


HANGS = """
import sys
import threading
import loratool as lt
from loratool.store import reader
from loratool.store.disk import lies_in_memory
from tests.unit.test_executors import Hanging

if __name__ == "__main__":
    reader.FileReader = Hanging
    lt.merge([sys.argv[1] + "/a1"], base=sys.argv[1] + "/base", output=sys.argv[2], threads=1,
             executor="processes")
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_workers_die_with_their_parent(inputs: Path, tmp_path: Path) -> None:
    """However it ends, nobody writes on into files that the next run may take over."""
    words = [sys.executable, "-c", HANGS, str(inputs), str(tmp_path / "out")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = Path("/proc") / parent.stdout.readline().strip() / "stat"
        assert worker.exists()
        parent.kill()
        until = time.monotonic() + 60
        while worker.exists() and worker.read_text().rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() < until
            time.sleep(0.05)


def test_a_step_that_kills_twice_is_an_error(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing half-written is left, and the same command goes on with threads."""
    with monkeypatch.context() as patch:
        kill_at(patch, {2: 9})
        with pytest.raises(DiskError) as caught:
            call("merge", inputs, tmp_path / "out", "processes")
    assert caught.value.code == "LT-606" and "-9" in str(caught.value)
    assert not (tmp_path / "out").exists()
    call("merge", inputs, tmp_path / "out")
    call("merge", inputs, tmp_path / "clean")
    assert contents(tmp_path / "out") == contents(tmp_path / "clean")


def test_errors_come_through(tmp_path: Path) -> None:
    weight = randn(96, 64, seed=1)
    weight[0, 0] = float("nan")
    save_checkpoint(tmp_path / "base", {"model.layers.0.q_proj.weight": weight})
    save_adapter(
        tmp_path / "a", random_factors({"model.layers.0.q_proj": (96, 64)}, rank=2, seed=1)
    )
    with pytest.raises(NumericError) as caught:
        lt.merge([tmp_path / "a"], base=tmp_path / "base", output=tmp_path / "out",
                 executor="processes")  # fmt: skip
    assert caught.value.code == "LT-804" and caught.value.key is not None


@pytest.mark.parametrize("command", COMMANDS)
def test_plans_travel(
    command: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As JSON and back they are the same, and have the same identity."""
    plans: list[Plan] = []

    def note(plan: Plan, *args: Any, **options: Any) -> list[Any]:
        plans.append(plan)
        return execute(plan, *args, **options)

    monkeypatch.setattr(run, "execute", note)
    call(command, inputs, tmp_path / "out")
    assert plans
    for plan in plans:
        far = wire.load(wire.dump(plan), Plan)
        assert far.plan_id() == plan.plan_id()
        assert (far.shards, far.notes) == (plan.shards, plan.notes)
        assert [(s.inputs, s.parts) for s in far.steps] == [(s.inputs, s.parts) for s in plan.steps]
        stamps = [[r.stamp for r in p.refs()] for p in (far, plan)]
        assert stamps[0] == stamps[1] and all(stamps[0])


@pytest.mark.parametrize("text", [b"", b"{}", b"[1]", b'{"is":"Plan"}', b'{"is":"Path"}',
                                  b'{"is":"Plan","command":1,"steps":[]}'])  # fmt: skip
def test_what_is_no_plan_is_a_bug(text: bytes) -> None:
    with pytest.raises(BugError) as caught:
        wire.load(text, Plan)
    assert caught.value.code == "LT-004"


def test_there_are_three() -> None:
    with pytest.raises(UsageError) as caught:
        find_executor("fibers")
    assert caught.value.code == "LT-209"


def watched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every worker that is started."""
    started: list[Any] = []
    make = processes._Worker.__init__

    def init(self: Any, env: Env) -> None:
        make(self, env)
        started.append(self)

    monkeypatch.setattr(processes._Worker, "__init__", init)
    return started


def kill_at(monkeypatch: pytest.MonkeyPatch, times: dict[int, int]) -> list[int]:
    """Kill the worker that is given step number so and so, so many times."""
    killed: list[int] = []
    begin = processes._Worker.begin

    def kill(self: Any, order: Order) -> None:
        if times.get(order.index, 0) > 0:
            times[order.index] -= 1
            os.kill(self._process.pid, signal.SIGKILL)
            self._process.join()  # noticed before the others have done all that is left
            killed.append(self._process.pid)
        begin(self, order)

    monkeypatch.setattr(processes._Worker, "begin", kill)
    return killed


@pytest.mark.parametrize("full", [1, 3, 4])
def test_a_full_gpu_has_fewer_threads(
    full: int, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So many of four find no memory, and leave their pieces to the others; not the last one."""
    call("merge", inputs, tmp_path / "want")
    real, left, lock = StepWork.process, [full], threading.Lock()

    def process(self: StepWork, *given: Any) -> int:
        with lock:
            left[0] -= 1
            is_full = left[0] >= 0
        if is_full:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")
        return real(self, *given)

    monkeypatch.setattr(StepWork, "process", process)
    two: Any = {"output": tmp_path / "out", "threads": 4, "executor": "threads"}
    adapters = [inputs / "a1", f"{inputs / 'a2'}:0.5"]
    if full < 4:
        lt.merge(adapters, base=inputs / "base", **two)
        assert contents(tmp_path / "out") == contents(tmp_path / "want")
        return
    left[0] = 1 << 30
    with pytest.raises(DiskError, match="memory is full"):
        lt.merge(adapters, base=inputs / "base", **two)


def test_a_merge_on_the_cpu_asks_no_driver(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each question takes it milliseconds, and many processes wait for each other there."""

    def asked(*words: object) -> None:
        raise AssertionError("the driver was asked")

    for name in ("is_available", "current_device", "device_count", "init", "stream"):
        monkeypatch.setattr(torch.cuda, name, asked)
    lt.merge([inputs / "a1"], base=inputs / "base", output=tmp_path / "out", device="cpu")
