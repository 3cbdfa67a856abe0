"""Workers that do whole steps somewhere else: who is at what, whose worker was lost, what failed.

A step goes out as JSON (`loratool.wire`), its result comes back pickled, and what it wrote lies
in the file that the driver has made, with the checksums of its pieces in the result.  A step whose
worker is lost is done again, from its first byte, by another one.

Where workers cannot write into the driver's files because the output is an object store, a worker
on another machine is given all steps of a shard: it makes that file by itself, and uploads it.
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
from loratool.frozen import Frozen, replace
from loratool.plan import Step
from loratool.store.far_file import FarFile
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


class ShardOrder(Frozen):
    """A shard on its way to a worker; can be pickled.

    Attributes:
        steps: all of it, as JSON, in file order.
        file: what it makes.
    """

    steps: tuple[bytes, ...]
    file: FarFile


class Crew(Protocol[Job]):
    """The workers.

    Attributes:
        attempts: how many workers may be lost at one step.
    """

    attempts: int

    def begin(self, order: Order | ShardOrder) -> Job:
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


Work = tuple[Task, ...]
"""What one worker is given: a step, or those of a shard."""


def run_whole_steps(
    crew: Crew[Job], env: Env, tasks: Iterator[Task], desk: Desk, workers: int, *,
    are_far: bool = False,
) -> None:  # fmt: skip
    """Have a crew do all tasks, see `loratool.engine.executors.Executor`.

    Args:
        crew: the workers.
        env: where steps run.
        tasks: what to do.
        desk: takes results.
        workers: how many at once.
        are_far: they are on other machines.

    Raises:
        DiskError: LT-606, as many workers as may be were lost at one step.
        BaseException: whatever a step raised.
    """
    at_work: dict[Job, tuple[Work, int]] = {}
    again: deque[tuple[Work, int]] = deque()
    finished: deque[tuple[Task, Result]] = deque()
    works = _by_shard(tasks) if are_far else ((task,) for task in tasks)
    try:
        while True:
            while len(at_work) < workers and (todo := _next(again, works)) is not None:
                at_work[crew.begin(_order(env, todo[0], are_far))] = todo
            while finished:  # after the new orders: a file may have to be completed
                task, result = finished.popleft()
                desk.advance(result.read)
                desk.done(task, result)
            if not at_work:
                return
            for job in crew.wait(list(at_work)):
                work, attempt = at_work.pop(job)
                try:
                    answer = crew.end(job)
                except LostError as loss:
                    if attempt == crew.attempts:
                        raise _too_many(work[0], attempt, loss) from None
                    again.append((work, attempt + 1))
                    continue
                finished.extend(zip(work, _opened(answer), strict=True))
    finally:
        crew.stop()
        desk.release()


def _by_shard(tasks: Iterator[Task]) -> Iterator[Work]:
    """Steps one by one, but those of a shard that its worker uploads together."""
    group: list[Task] = []
    for task in tasks:
        if group and task.step.shard != group[0].step.shard:
            yield tuple(group)
            group = []
        if task.out is not None and task.out.is_far():
            group.append(task)
        else:
            yield (task,)
    if group:
        yield tuple(group)


def _next(again: deque[tuple[Work, int]], works: Iterator[Work]) -> tuple[Work, int] | None:
    """Work and which attempt at it this is; None if there is none left."""
    if again:
        return again.popleft()
    work = next(works, None)
    return None if work is None else (work, 1)


def _order(env: Env, work: Work, are_far: bool) -> Order | ShardOrder:
    for task in work:
        env.reader.hold(task.step.refs())  # so that the run's end checks what a worker has read
    out = work[0].out
    if are_far and out is not None and out.is_far():
        steps = [task.step for task in work]
        return ShardOrder(tuple(map(wire.dump, steps)), out.sink.far_file(steps))
    (task,) = work
    part = None if task.out is None else task.out.part()
    return Order(task.index, wire.dump(task.step), part)


def _too_many(task: Task, attempts: int, loss: LostError) -> DiskError:
    return DiskError(
        "LT-606", "worker after worker died at the same step", key=task.step.output.name,
        got=f"{attempts} died, the last one with {loss}",
        hint="the system may be out of memory: fewer --threads take less",
    )  # fmt: skip


def carry_out(order: Order | ShardOrder, env: Env, *, sync: bool = False) -> bytes:
    """Do what is ordered where the worker is; results, or what it raised, for `run_whole_steps`.

    Args:
        order: what to do.
        env: where it runs.
        sync: what was written is on the disk afterwards; else the driver sees to that.
    """
    answer: Any
    try:
        with exact_arithmetic():
            if isinstance(order, ShardOrder):
                answer = _make_shard(order, env)
            else:
                answer = _do_step(order, env, sync)
    except BaseException as error:  # raised again by the driver
        answer = error
    return _closed(answer)


def _do_step(order: Order, env: Env, sync: bool) -> Result:
    part = order.part
    with nullcontext() if part is None else closing(part):
        result = run_step(wire.load(order.step, Step), env, part)
        if part is not None and sync:
            part.sync()
    return result


def _make_shard(order: ShardOrder, env: Env) -> list[Result]:
    """A result per step, with what became of the whole."""
    with closing(order.file) as file:
        outs = file.begin()
        results = [
            run_step(wire.load(step, Step), env, out)
            for step, out in zip(order.steps, outs, strict=True)
        ]
        made = file.end()
    return [replace(result, made=made) for result in results]


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


def _opened(answer: bytes) -> list[Result]:
    found = pickle.loads(answer)
    if isinstance(found, BaseException):
        raise found
    results: list[Result] = found if isinstance(found, list) else [found]
    return results
