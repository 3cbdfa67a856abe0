"""Threads that do the arithmetic while the calling one waits, and can be interrupted at once.

Each computes with one thread of its own: results do not depend on how many there are.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

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


class Crew:
    """Work that one thread has to get done before others can go on: they help.

    The thread that leads enters it and calls `share`, as often as it likes; the others call
    `help`, which returns once the leader has left.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._work: Callable[[Any], None]
        self._items: deque[Any] = deque()
        self._at_work = 0
        self._has_left = False
        self._failure: BaseException | None = None

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        with self._changed:
            self._has_left, self._failure = True, error
            self._changed.notify_all()

    def share(self, work: Callable[[T], None], items: Sequence[T]) -> None:
        """Do ``work`` of every item, in any order; returns when all is done.

        Raises:
            BaseException: what one of them raised first; those not begun are left out.
        """
        with self._changed:
            self._work, self._items = work, deque(items)
            self._changed.notify_all()
        self._take()
        with self._changed:
            self._changed.wait_for(lambda: not self._at_work)
        if self._failure is not None:
            raise self._failure

    def help(self) -> None:
        """Take items until the leader has left.

        Raises:
            BaseException: what the leader raised.
        """
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._items or self._has_left)
                if self._has_left:
                    break
            self._take()
        if self._failure is not None:
            raise self._failure

    def _take(self) -> None:
        while True:
            with self._changed:
                if not self._items:
                    return
                item = self._items.popleft()
                self._at_work += 1
            failure = None
            try:
                self._work(item)
            except BaseException as error:  # raised again by the leader
                failure = error
            with self._changed:
                self._at_work -= 1
                if failure is not None:
                    self._failure = failure
                    self._items.clear()
                if not self._at_work:
                    self._changed.notify_all()


def map_in_workers(work: Callable[[T], R], items: Sequence[T], count: int) -> list[R]:
    """``work`` of every item, in order.

    Args:
        work: called in any thread.
        items: whatever it takes.
        count: threads.
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
            results[number] = work(item)

    run_workers(max(1, min(count, len(items))), loop)
    return [results[number] for number in range(len(items))]
