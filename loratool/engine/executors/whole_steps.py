"""Workers that do whole steps somewhere else: who is at what, whose worker was lost, what failed.

A step goes out as JSON (`loratool.wire`), its result comes back pickled, and what it wrote lies
in the file that the driver has made, with the checksums of its pieces in the result.  A step whose
worker is lost is done again, from its first byte, by another one.
"""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from typing import Any, Protocol, TypeVar

from loratool import wire
from loratool.engine.device import exact_arithmetic
from loratool.engine.executors import Desk, Task
from loratool.engine.kernel import Env
from loratool.engine.step import Result, run_step
from loratool.errors import DiskError
from loratool.frozen import Frozen
from loratool.plan import Step
from loratool.store.shard_writer import FilePart

Job = TypeVar("Job")


class LostError(Exception):
    """A worker is gone, and with it its step; the text says how."""


class Order(Frozen):
    """A step on its way to a worker; can be pickled.

    Attributes:
        index: of the step in its plan.
        step: as JSON.
        part: where its tensor goes, None if nothing is written.
    """

    index: int
    step: bytes
    part: FilePart | None


class Crew(Protocol[Job]):
    """The workers.

    Attributes:
        attempts: how many workers may be lost at one step.
    """

    attempts: int

    def begin(self, order: Order) -> Job:
        """Give an order to a worker that has none."""

    def wait(self, jobs: Sequence[Job]) -> Sequence[Job]:
        """Those that have ended; one at least."""

    def end(self, job: Job) -> bytes:
        """What `carry_out` gave.

        Raises:
            LostError: the worker did not live to give it.
        """

    def stop(self) -> None:
        """Let no worker write anything any more."""


def run_whole_steps(
    crew: Crew[Job], env: Env, tasks: Iterator[Task], desk: Desk, workers: int
) -> None:
    """Have a crew do all tasks, see `loratool.engine.executors.Executor`.

    Raises:
        DiskError: LT-606, as many workers as may be were lost at one step.
        BaseException: whatever a step raised.
    """
    at_work: dict[Job, tuple[Task, int]] = {}
    again: deque[tuple[Task, int]] = deque()
    finished: deque[tuple[Task, Result]] = deque()
    try:
        while True:
            while len(at_work) < workers and (todo := _next(again, tasks)) is not None:
                at_work[crew.begin(_order(env, todo[0]))] = todo
            while finished:  # after the new orders: a file may have to be completed
                task, result = finished.popleft()
                desk.advance(result.read)
                desk.done(task, result)
            if not at_work:
                return
            for job in crew.wait(list(at_work)):
                task, attempt = at_work.pop(job)
                try:
                    answer = crew.end(job)
                except LostError as loss:
                    if attempt == crew.attempts:
                        raise _too_many(task, attempt, loss) from None
                    again.append((task, attempt + 1))
                    continue
                finished.append((task, _opened(answer)))
    finally:
        crew.stop()
        desk.release()


def _next(again: deque[tuple[Task, int]], tasks: Iterator[Task]) -> tuple[Task, int] | None:
    """A task and which attempt at it this is; None if there is none left."""
    if again:
        return again.popleft()
    task = next(tasks, None)
    return None if task is None else (task, 1)


def _order(env: Env, task: Task) -> Order:
    env.reader.hold(task.step.refs())  # so that the run's end checks what a worker has read
    part = None if task.out is None else task.out.part()
    return Order(task.index, wire.dump(task.step), part)


def _too_many(task: Task, attempts: int, loss: LostError) -> DiskError:
    return DiskError(
        "LT-606", "worker after worker died at the same step", key=task.step.output.name,
        got=f"{attempts} died, the last one with {loss}",
        hint="the system may be out of memory: fewer --threads take less",
    )  # fmt: skip


def carry_out(order: Order, env: Env, *, sync: bool = False) -> bytes:
    """Do a step where the worker is; its result, or what it raised, for `run_whole_steps`.

    Args:
        order: what to do.
        env: where it runs.
        sync: what was written is on the disk afterwards; else the driver sees to that.
    """
    answer: Any
    part = order.part
    try:
        with nullcontext() if part is None else closing(part), exact_arithmetic():
            answer = run_step(wire.load(order.step, Step), env, part)
            if part is not None and sync:
                part.sync()
    except BaseException as error:  # raised again by the driver
        answer = error
    return _closed(answer)


def _closed(answer: Any) -> bytes:
    """A result, or an error in a form that comes through."""
    data = None
    if isinstance(answer, BaseException):
        try:
            data = pickle.dumps(answer)
            pickle.loads(data)
        except Exception:  # of a class of somebody else's
            answer, data = RuntimeError(repr(answer)), None
    return data or pickle.dumps(answer)


def _opened(answer: bytes) -> Result:
    found = pickle.loads(answer)
    if isinstance(found, BaseException):
        raise found
    assert isinstance(found, Result)
    return found
