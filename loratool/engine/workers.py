"""Threads that do the arithmetic while the calling one waits, and can be interrupted at once.

Each computes with one thread of its own: results do not depend on how many there are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from loratool.engine.device import exact_arithmetic

_GRACE_S = 1.0  # after an interrupt: pieces take milliseconds, factorisations may take minutes

T = TypeVar("T")
R = TypeVar("R")


def run_workers(
    count: int, loop: Callable[[threading.Event], None], release: Callable[[], None] | None = None
) -> None:
    """Run ``loop(stop)`` in threads; raises the first failure.

    A worker deep in a factorisation when an interrupt comes is left behind, and with it the open
    files: a descriptor closed under its hands could be another file's by the time it writes.

    Args:
        count: threads.
        loop: takes tasks until there are none, or until ``stop`` is set.
        release: called once no worker is at work any more.
    """
    stop, idle, lock = threading.Event(), threading.Event(), threading.Lock()
    failures: list[BaseException] = []
    at_work = count

    def work() -> None:
        nonlocal at_work
        try:
            torch.set_num_threads(1)
            loop(stop)
        except BaseException as error:  # handed to the caller's thread, which raises it
            failures.append(error)
            stop.set()
        finally:
            with lock:
                at_work -= 1
                if not at_work:
                    idle.set()

    workers = [threading.Thread(target=work, daemon=True) for _ in range(count)]
    try:
        with exact_arithmetic():
            for worker in workers:
                worker.start()
            while not idle.wait(0.1):
                pass
    finally:
        stop.set()
        # Thread.is_alive will not do: a join that is interrupted makes it say False.
        if idle.wait(_GRACE_S):
            if release is not None:
                release()
            # Their work is done, not yet their end: torch aborts a process that exits first.
            for worker in workers:
                if worker.ident is not None:
                    worker.join(_GRACE_S)
    if failures:
        raise failures[0]


def map_in_workers(
    work: Callable[[T], R],
    items: Sequence[T],
    count: int,
    done: Callable[[int], None] | None = None,
) -> list[R]:
    """``work`` of every item, in order.

    Args:
        work: called in any thread.
        items: whatever it takes.
        count: threads.
        done: called with the number of items that are finished, from any thread.
    """
    results: dict[int, R] = {}
    todo = iter(enumerate(items))
    lock = threading.Lock()

    def loop(stop: threading.Event) -> None:
        while not stop.is_set():
            with lock:
                task = next(todo, None)
            if task is None:
                return
            number, item = task
            found = work(item)
            with lock:
                results[number] = found
                if done is not None:
                    done(len(results))

    run_workers(max(1, min(count, len(items))), loop)
    return [results[number] for number in range(len(items))]
