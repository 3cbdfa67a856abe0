"""Threads of this process, which share the pieces of a step."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from loratool.engine import grid
from loratool.engine.executors import Desk, Task
from loratool.engine.kernel import Env
from loratool.engine.step import Lane, Result, StepWork
from loratool.engine.workers import run_workers

_Piece = tuple[Task, StepWork, list[grid.Block]]


def run(env: Env, tasks: Iterator[Task], desk: Desk, workers: int) -> None:
    """See `loratool.engine.executors.Executor`."""
    lock = threading.RLock()  # tasks are made, and empty ones finish, under it
    pieces = _pieces(env, tasks, desk)

    def loop(stop: threading.Event) -> None:
        lane = Lane(env.device)
        while not stop.is_set():
            with lock:
                piece = next(pieces, None)
            if piece is None:
                return
            run_piece(lane, piece, desk)

    run_workers(workers, loop, desk.release)


def run_piece(lane: Lane, piece: _Piece, desk: Desk) -> None:
    """Do a piece; the last one of a step finishes it."""
    task, work, blocks = piece
    desk.advance(work.process(lane, blocks))
    if work.is_last():
        desk.done(task, Result(work.finish()))


def _pieces(env: Env, tasks: Iterator[Task], desk: Desk) -> Iterator[_Piece]:
    for task in tasks:
        work = StepWork(task.step, env, task.out)
        if not work.pieces:
            desk.done(task, Result(work.finish()))
        for blocks in work.pieces:
            yield task, work, blocks
