"""Worker processes, each of which does whole steps.

A step goes out as JSON (`loratool.wire`), its result comes back pickled, and what it wrote lies
in the file that the parent has made.  A worker that dies is noticed at once; its step is done
again, from its first byte, by another one, and only once.
"""

from __future__ import annotations

import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import closing, nullcontext
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from loratool import wire
from loratool.engine.device import exact_arithmetic
from loratool.engine.executors import Desk, Task
from loratool.engine.kernel import Env
from loratool.engine.step import Result, run_step
from loratool.errors import DiskError
from loratool.plan import Step

_ATTEMPTS = 2


def run(env: Env, tasks: Iterator[Task], desk: Desk, workers: int) -> None:
    """See `loratool.engine.executors.Executor`."""
    crew: list[_Worker] = []
    again: deque[tuple[Task, int]] = deque()
    try:
        while True:
            busy = [w for w in crew if w.task is not None]
            while len(busy) < workers and (todo := _next(again, tasks)) is not None:
                busy.append(_idle(crew, env))
                busy[-1].begin(*todo)
            if not busy:
                return
            ready = wait([w.pipe for w in busy])
            for worker in (w for w in busy if w.pipe in ready):
                task, attempt = worker.end()
                result = worker.result()
                if result is not None:
                    desk.advance(result.read)
                    desk.done(task, result)
                    continue
                crew.remove(worker)
                if attempt == _ATTEMPTS:
                    raise _died(worker, task)
                again.append((task, attempt + 1))
    finally:
        for worker in crew:
            worker.kill()
        desk.release()


def _next(again: deque[tuple[Task, int]], tasks: Iterator[Task]) -> tuple[Task, int] | None:
    """A task and which attempt at it this is; None if there is none left."""
    if again:
        return again.popleft()
    task = next(tasks, None)
    return None if task is None else (task, 1)


def _idle(crew: list[_Worker], env: Env) -> _Worker:
    """A worker without a task, a new one if all have one."""
    found = next((w for w in crew if w.task is None), None)
    if found is None:
        found = _Worker(env)
        crew.append(found)
    return found


def _died(worker: _Worker, task: Task) -> DiskError:
    return DiskError(
        "LT-606", "two worker processes died at the same step", key=task.step.output.name,
        got=f"exit code {worker.exit_code()}",
        hint="the system may be out of memory: fewer --threads take less",
    )  # fmt: skip


class _Worker:
    """The parent's end of a worker process.

    Attributes:
        pipe: tasks out, results in.
        task: what it is at.
    """

    def __init__(self, env: Env) -> None:
        context = get_context("spawn")  # never fork: torch has threads
        self._reader = env.reader
        self.pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, env), daemon=True)
        self._process.start()
        other.close()  # the worker's end is the worker's alone: its death closes it
        self.task: Task | None = None
        self._attempt = 0

    def begin(self, task: Task, attempt: int) -> None:
        """Give it a step; one that is dead by now shows in `result`."""
        self.task, self._attempt = task, attempt
        self._reader.hold(task.step.refs())  # so that the run's end checks what it has read
        part = None if task.out is None else task.out.part()
        try:
            self.pipe.send_bytes(pickle.dumps((wire.dump(task.step), part)))
        except OSError:
            pass

    def end(self) -> tuple[Task, int]:
        """Take its task back."""
        task, self.task = self.task, None
        assert task is not None
        return task, self._attempt

    def result(self) -> Result | None:
        """What it has sent; None if it has died.

        Raises:
            BaseException: whatever the step raised.
        """
        try:
            found = pickle.loads(self.pipe.recv_bytes())
        except (EOFError, OSError):
            self.kill()
            return None
        if isinstance(found, BaseException):
            raise found
        assert isinstance(found, Result)
        return found

    def exit_code(self) -> int | None:
        """Of the process, negative for a signal."""
        return self._process.exitcode

    def kill(self) -> None:
        """End it, whatever it does; it writes into no file that counts as complete."""
        self._process.kill()
        self._process.join()
        self.pipe.close()


def _serve(pipe: Connection, env: Env) -> None:
    """Do steps until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    threading.Thread(target=_follow, args=(parent_process(),), daemon=True).start()
    torch.set_num_threads(1)
    with exact_arithmetic():
        while True:
            try:
                text, part = pickle.loads(pipe.recv_bytes())
            except (EOFError, OSError):
                return
            answer: Any
            try:
                with nullcontext() if part is None else closing(part):
                    answer = run_step(wire.load(text, Step), env, part)
            except BaseException as error:  # raised again in the parent
                answer = error
            pipe.send_bytes(_pickled(answer))


def _follow(parent: BaseProcess | None) -> None:
    """Die with the parent, in the middle of a step too: another run may go on with its files."""
    if parent is not None:
        parent.join()
        os._exit(1)


def _pickled(answer: Any) -> bytes:
    """A result, or an error in a form that comes through."""
    data = None
    if isinstance(answer, BaseException):
        try:
            data = pickle.dumps(answer)
            pickle.loads(data)
        except Exception:  # of a class of somebody else's
            answer, data = RuntimeError(repr(answer)), None
    return data or pickle.dumps(answer)
