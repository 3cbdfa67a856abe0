"""Worker processes of this machine, each of which does whole steps.

A worker that dies is noticed at once: its end of the pipe closes.
"""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Iterator, Sequence
from copy import copy
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from loratool.engine.buffers import Pool, Scratch
from loratool.engine.executors import Desk, Task
from loratool.engine.executors.whole_steps import (
    LostError,
    Order,
    ShardOrder,
    carry_out,
    run_whole_steps,
)
from loratool.engine.kernel import Env
from loratool.engine.machine import can_fork, leave_signals
from loratool.frozen import replace


def run(env: Env, tasks: Iterator[Task], desk: Desk, workers: int) -> None:
    """See `loratool.engine.executors.Executor`."""
    run_whole_steps(_Crew(env), env, tasks, desk, workers)


class _Crew:
    """Processes, started when they are needed, see `loratool.engine.executors.whole_steps.Crew`."""

    attempts = 2

    def __init__(self, env: Env) -> None:
        self._env = env
        self._all: list[_Worker] = []
        self._idle: list[_Worker] = []

    def begin(self, order: Order | ShardOrder) -> _Worker:
        """Give an order to a worker that has none, a new one if all have one."""
        if not self._idle:
            self._all.append(_Worker(self._env))
            self._idle.append(self._all[-1])
        worker = self._idle.pop()
        worker.begin(order)
        return worker

    def wait(self, jobs: Sequence[_Worker]) -> Sequence[_Worker]:
        """Those that have sent something, or died."""
        ready = wait([worker.pipe for worker in jobs])
        return [worker for worker in jobs if worker.pipe in ready]

    def end(self, job: _Worker) -> bytes:
        """What a worker has sent."""
        try:
            answer = job.pipe.recv_bytes()
        except (EOFError, OSError):
            self._all.remove(job)
            raise LostError(f"exit code {job.kill()}") from None
        self._idle.append(job)
        return answer

    def stop(self) -> None:
        """End all of them, whatever they do; none writes into a file that counts as complete."""
        for worker in self._all:
            worker.kill()


class _Worker:
    """The parent's end of a worker process.

    Attributes:
        pipe: orders out, results in.
    """

    def __init__(self, env: Env) -> None:
        is_copy = can_fork()  # torch is loaded there already
        context = get_context("fork") if is_copy else get_context("spawn")
        self.pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, env, is_copy), daemon=True)
        self._process.start()
        other.close()  # the worker's end is the worker's alone: its death closes it

    def begin(self, order: Order | ShardOrder) -> None:
        """Give it a step; one that is dead by now shows when its result is asked for."""
        try:
            self.pipe.send_bytes(pickle.dumps(order))
        except OSError:
            pass

    def kill(self) -> int | None:
        """End it; its exit code, negative for a signal."""
        self._process.kill()
        self._process.join()
        self.pipe.close()
        return self._process.exitcode


def _serve(pipe: Connection, env: Env, is_copy: bool) -> None:
    """Do steps until the parent is gone."""
    leave_signals()
    if is_copy:
        _let_go({pipe.fileno(), parent_process().sentinel})  # type: ignore[union-attr]
        env = replace(env, reader=copy(env.reader), scratch=Scratch(), pool=Pool())
    threading.Thread(target=_follow, args=(parent_process(),), daemon=True).start()
    torch.set_num_threads(1)
    while True:
        try:
            order = pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            return
        pipe.send_bytes(carry_out(order, env))


def _let_go(kept: set[int]) -> None:
    """Have no part in what the parent has open: its locks end with it, its pipes are its own.

    The numbers stay taken, so that nothing of the parent's closes a file of this process's.
    """
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]:
        if number > 2 and number not in kept:
            os.dup2(nothing, number)  # that of the listing itself is gone by now, and harmless


def _follow(parent: BaseProcess | None) -> None:
    """Die with the parent, in the middle of a step too: another run may go on with its files."""
    if parent is not None:
        parent.join()
        os._exit(1)
