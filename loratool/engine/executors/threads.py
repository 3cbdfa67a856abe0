"""Threads of this process.  Each does a step of its own; when none is left it helps the others."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from loratool.engine import grid
from loratool.engine.executors import Desk, Task
from loratool.engine.kernel import Env
from loratool.engine.step import Lane, Result, StepWork
from loratool.engine.workers import run_workers


def run(env: Env, tasks: Iterator[Task], desk: Desk, workers: int) -> None:
    """See `loratool.engine.executors.Executor`."""
    steps = _Steps(env, tasks, desk)

    def loop(stop: threading.Event) -> None:
        lane = Lane(env.device)
        mine: _Begun | None = None
        while not stop.is_set():
            found = steps.next(mine)
            if found is None:
                return
            mine, blocks = found
            run_piece(lane, mine, blocks, desk)

    run_workers(workers, loop, desk.release)


class _Begun:
    """A step at work.

    Attributes:
        task: what to do.
        work: the same, with its kernel.
        left: pieces that nobody has taken, the next one last.
    """

    def __init__(self, task: Task, work: StepWork) -> None:
        self.task, self.work = task, work
        self.left = work.pieces[::-1]


def run_piece(lane: Lane, step: _Begun, blocks: list[grid.Block], desk: Desk) -> None:
    """Do a piece; the last one of a step finishes it."""
    desk.advance(step.work.process(lane, blocks))
    if step.work.is_last():
        desk.done(step.task, Result(step.work.finish()))


class _Steps:
    """Says what a thread does next: a piece of its own step, of a new one, of somebody else's.

    Threads that keep to their own steps do not wait for each other's factors and results.
    """

    def __init__(self, env: Env, tasks: Iterator[Task], desk: Desk) -> None:
        self._env, self._tasks, self._desk = env, tasks, desk
        self._begun: list[_Begun] = []  # those with pieces left
        self._lock = threading.RLock()  # tasks are made, and empty ones finish, under it

    def next(self, mine: _Begun | None) -> tuple[_Begun, list[grid.Block]] | None:
        """A piece, and whose it is; None if there is none left."""
        with self._lock:
            step = mine if mine is not None and mine.left else self._begin() or self._longest()
            if step is None:
                return None
            blocks = step.left.pop()
            if not step.left:
                self._begun.remove(step)
            return step, blocks

    def _begin(self) -> _Begun | None:
        for task in self._tasks:
            work = StepWork(task.step, self._env, task.out)
            if work.pieces:
                self._begun.append(_Begun(task, work))
                return self._begun[-1]
            self._desk.done(task, Result(work.finish()))
        return None

    def _longest(self) -> _Begun | None:
        return max(self._begun, key=lambda step: len(step.left), default=None)
