"""What the driver does when workers are lost, late, or fail: with workers that are made up."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from loratool import wire
from loratool.adapter import TensorData, TensorRef
from loratool.engine.executors import Task, whole_steps
from loratool.engine.executors.whole_steps import LostError, Order, carry_out, run_whole_steps
from loratool.engine.kernel import Env
from loratool.engine.step import Result
from loratool.errors import BadFileError, DiskError, NumericError
from loratool.plan import Step, TensorSpec
from loratool.store.far_reader import FarReader
from loratool.store.reader import FileReader
from loratool.store.stamps import stamp_of
from tests.make import randn, save_checkpoint

STEPS = 6


class Crew:
    """Workers whose fate at each order is written down.

    Args:
        fates: step -> what becomes of it, time after time: an exception to send, or a loss.
        newest_first: what was begun last ends first.
    """

    attempts = 3

    def __init__(self, fates: dict[int, list[Any]], *, newest_first: bool = False) -> None:
        self.fates, self.newest_first = fates, newest_first
        self.begun: list[int] = []
        self.most = self.now = 0
        self.is_stopped = False

    def begin(self, order: Order) -> int:
        assert not self.is_stopped
        assert wire.load(order.step, Step).output.name == f"t{order.index}"
        self.begun.append(order.index)
        self.now += 1
        self.most = max(self.most, self.now)
        return len(self.begun) - 1

    def wait(self, jobs: Sequence[int]) -> Sequence[int]:
        assert jobs
        return [max(jobs) if self.newest_first else min(jobs)]

    def end(self, job: int) -> bytes:
        self.now -= 1
        index = self.begun[job]
        fate = self.fates.get(index, [])
        found = fate.pop(0) if fate else Result(index, read=10)
        if isinstance(found, LostError):
            raise found
        return pickle.dumps(found)

    def stop(self) -> None:
        self.is_stopped = True


class Desk:
    def __init__(self) -> None:
        self.results: dict[int, Any] = {}
        self.read = 0
        self.is_released = False

    def done(self, task: Task, result: Result) -> None:
        assert task.index not in self.results, "a result twice"
        self.results[task.index] = result.value

    def advance(self, nbytes: int) -> None:
        self.read += nbytes

    def release(self) -> None:
        self.is_released = True


def tasks() -> Iterator[Task]:
    for index in range(STEPS):
        source = TensorData("x", "F32", (1,), b"1234")
        output = TensorSpec(f"t{index}", "F32", (1,))
        yield Task(index, Step("cast", output, (source,), (1, 1)), None)


def run(crew: Crew, workers: int = 2) -> Desk:
    desk = Desk()
    try:
        run_whole_steps(crew, Env(FileReader()), tasks(), desk, workers)
    finally:
        assert crew.is_stopped and desk.is_released
    return desk


@pytest.mark.parametrize("workers", [1, 2, 20])
@pytest.mark.parametrize("newest_first", [False, True])
def test_every_step_is_done_once(workers: int, newest_first: bool) -> None:
    crew = Crew({}, newest_first=newest_first)
    desk = run(crew, workers)
    assert desk.results == {i: i for i in range(STEPS)} and desk.read == 10 * STEPS
    assert crew.most == min(workers, STEPS)


def test_a_lost_step_is_done_again() -> None:
    crew = Crew({1: [LostError("gone")], 5: [LostError("gone"), LostError("gone")]})
    assert run(crew).results == {i: i for i in range(STEPS)}
    assert sorted(crew.begun) == [0, 1, 1, 2, 3, 4, 5, 5, 5]


def test_a_step_that_kills_every_worker_is_an_error() -> None:
    with pytest.raises(DiskError) as caught:
        run(Crew({3: [LostError("signal 9")] * 3}))
    assert caught.value.code == "LT-606" and caught.value.key == "t3"
    assert "signal 9" in str(caught.value) and "3 died" in str(caught.value)


@pytest.mark.parametrize("error", [NumericError("LT-801", "bad"), KeyboardInterrupt()])
def test_what_a_step_raises_ends_the_run(error: BaseException) -> None:
    crew = Crew({2: [error]})
    with pytest.raises(type(error)):
        run(crew, workers=1)
    assert crew.begun == [0, 1, 2]


def test_an_error_that_cannot_travel_still_says_what_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class OddError(Exception):
        """Of a class that no other process can find."""

    def fail(*_: object) -> None:
        raise OddError("how odd")

    monkeypatch.setattr(whole_steps, "run_step", fail)
    order = Order(0, wire.dump(next(tasks()).step), None)
    answer = pickle.loads(carry_out(order, Env(FileReader())))
    assert isinstance(answer, RuntimeError) and "how odd" in str(answer)


def test_stamps_of_another_machine(tmp_path: Path) -> None:
    """Its number of the device is another one; a file that differs in size or time is refused."""
    save_checkpoint(tmp_path / "base", {"a": randn(4, 4, seed=1)})
    path = tmp_path / "base" / "model.safetensors"
    dev, inode, size, mtime, ctime = stamp_of(path) or (0, 0, 0, 0, 0)
    far = (dev + 1, inode, size, mtime, ctime + 5)

    def read(path: Path, stamp: Any) -> bytes:
        ref = TensorRef(path, "a", "F32", (4, 4), size - 64, 64, stamp=stamp)
        buffer = bytearray(64)
        with FarReader() as reader:
            reader.read_into(ref, 0, memoryview(buffer))
            reader.read_into(ref, 0, memoryview(buffer))
        return bytes(buffer)

    assert read(path, far) == path.read_bytes()[-64:] == read(path, None)
    for other in ((dev, inode, size + 1, mtime, ctime), (dev, inode, size, mtime + 1, ctime)):
        with pytest.raises(BadFileError) as caught:
            read(path, other)
        assert caught.value.code == "LT-332"
    with pytest.raises(DiskError) as unseen:
        read(tmp_path / "elsewhere", far)
    assert unseen.value.code == "LT-618"
