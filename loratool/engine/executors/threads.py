"""Threads of this process.  Each does a step of its own; when none is left it helps the others.

With several GPUs each has as many threads of its own.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator

import torch

from loratool.engine import grid
from loratool.engine.executors import Desk, Task
from loratool.engine.kernel import Env
from loratool.engine.step import Lane, Result, StepWork
from loratool.engine.workers import run_workers
from loratool.errors import DiskError
from loratool.frozen import replace


def run(env: Env, tasks: Iterator[Task], desk: Desk, workers: int) -> None:
    """See `loratool.engine.executors.Executor`."""
    envs = [env, *(replace(env, device=device, others=()) for device in env.others)]
    steps = _Steps(tasks, desk, {one.device: workers for one in envs})
    turns = itertools.cycle(envs)

    def loop(stop: threading.Event) -> None:
        here = next(turns)
        lane = Lane(here.device)
        mine: _Begun | None = None
        while not stop.is_set():
            found = steps.next(here, mine)
            if found is None:
                return
            mine, blocks = found
            try:
                run_piece(lane, mine, blocks, desk)
            except torch.OutOfMemoryError as error:  # of a GPU: fewer threads take less of it
                if steps.leave(mine, blocks):
                    return
                raise DiskError(
                    "LT-619", "the GPU's memory is full", key=mine.task.step.output.name,
                    got=str(error).partition(". ")[0], hint="--device cpu",
                ) from error  # fmt: skip

    run_workers(workers * len(envs), loop, desk.release)


class _Begun:
    """A step at work.

    Attributes:
        task: what to do.
        work: the same, with its kernel.
        device: where.
        left: pieces that nobody has taken, the next one last.
    """

    def __init__(self, task: Task, work: StepWork, device: torch.device) -> None:
        self.task, self.work, self.device = task, work, device
        self.left = work.pieces[::-1]


def run_piece(lane: Lane, step: _Begun, blocks: list[grid.Block], desk: Desk) -> None:
    """Do a piece; the last one of a step finishes it."""
    desk.advance(step.work.process(lane, blocks))
    if step.work.is_last():
        desk.done(step.task, Result(step.work.finish(lane)))


class _Steps:
    """Says what a thread does next: a piece of its own step, of a new one, of somebody else's.

    Threads that keep to their own steps do not wait for each other's factors and results.
    """

    def __init__(self, tasks: Iterator[Task], desk: Desk, at_work: dict[torch.device, int]) -> None:
        self._tasks, self._desk = tasks, desk
        self._begun: list[_Begun] = []  # those with pieces left
        self._at_work = at_work
        self._lock = threading.RLock()  # tasks are made, and empty ones finish, under it

    def leave(self, step: _Begun, blocks: list[grid.Block]) -> bool:
        """A thread ends, its piece undone; False if no other one would do that."""
        with self._lock:
            if self._at_work[step.device] == 1:
                return False
            self._at_work[step.device] -= 1
            if not step.left:
                self._begun.append(step)
            step.left.append(blocks)
            return True

    def next(self, env: Env, mine: _Begun | None) -> tuple[_Begun, list[grid.Block]] | None:
        """A piece, and whose it is; None if there is none left for this device."""
        with self._lock:
            step = mine if mine is not None and mine.left else None
            step = step or self._begin(env) or self._longest(env.device)
            if step is None:
                self._at_work[env.device] -= 1
                return None
            blocks = step.left.pop()
            if not step.left:
                self._begun.remove(step)
            return step, blocks

    def _begin(self, env: Env) -> _Begun | None:
        for task in self._tasks:
            work = StepWork(task.step, env, task.out)
            if work.pieces:
                self._begun.append(_Begun(task, work, env.device))
                return self._begun[-1]
            self._desk.done(task, Result(work.finish()))
        return None

    def _longest(self, device: torch.device) -> _Begun | None:
        here = [step for step in self._begun if step.device == device]
        return max(here, key=lambda step: len(step.left), default=None)
