"""The same small work on many things, shared among copies of this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from loratool.engine.machine import can_fork, leave_signals, usable_cores

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

T = TypeVar("T")
R = TypeVar("R")
_FEWEST = 24
"""Things for each copy: fewer are done before it has started."""


def results_of(work: Callable[[T], R], things: Sequence[T]) -> Iterator[R]:
    """What comes of each thing, in their order; here where copies are impossible or do not pay.

    Args:
        work: of one thing; it only reads, and what it returns can be pickled.
        things: any number.
    """
    most = len(things) // _FEWEST
    count = min(most, _possible()) if most > 1 else 1
    if count == 1:
        yield from map(work, things)
        return
    from multiprocessing import get_context

    fork = get_context("fork")
    pipes, crew = [], []
    try:
        for first in range(count):
            here, there = fork.Pipe(duplex=False)
            pipes.append(here)
            share = things[first::count]
            given = (work, share, there, tuple(pipes))
            crew.append(fork.Process(target=_send, args=given, daemon=True))
            crew[-1].start()
            there.close()  # the copy's alone: its death closes it
        for number, thing in enumerate(things):
            try:
                yield pipes[number % count].recv()
            except (EOFError, OSError):  # it was killed
                yield work(thing)
    finally:
        for copy, pipe in zip(crew, pipes, strict=False):
            copy.kill()
            copy.join()
            pipe.close()


def _possible() -> int:
    return usable_cores() if can_fork() else 1


def _send(
    work: Callable[[T], R], things: Sequence[T], there: Connection, ours: Sequence[Connection]
) -> None:
    for pipe in ours:
        pipe.close()  # the parent's alone: its death ends the copies
    leave_signals()
    try:
        for thing in things:
            there.send(work(thing))
    except OSError:  # nobody asks any more, or lives to
        return
