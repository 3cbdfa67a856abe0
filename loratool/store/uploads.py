"""Uploads in the background: few at a time, and whoever makes the next file waits for room."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

_AT_ONCE = 2

Job = Callable[[], None]


class Uploads:
    """Threads that do jobs.  They end with the process, whatever they are at.

    Args:
        at_once: how many.
    """

    def __init__(self, at_once: int = _AT_ONCE) -> None:
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._room = threading.Semaphore(at_once)
        self._changed = threading.Condition()
        self._failure: BaseException | None = None
        self._left = 0
        self._threads = at_once
        for _ in range(at_once):
            threading.Thread(target=self._work, daemon=True).start()

    @property
    def are_under_way(self) -> bool:
        """True if a job is not done."""
        return self._left > 0

    def wait_for_room(self) -> None:
        """Until a thread has nothing to do.

        Raises:
            BaseException: what an earlier job raised.
        """
        self._wait(self._threads - 1)

    def give(self, job: Job) -> None:
        """Have a job done; returns when there is a thread for it.

        Raises:
            BaseException: what an earlier job raised.
        """
        self._room.acquire()
        with self._changed:
            if self._failure is not None:
                self._room.release()
                raise self._failure
            self._left += 1
        self._jobs.put(job)

    def wait(self) -> None:
        """Until all jobs are done.

        Raises:
            BaseException: what one of them raised.
        """
        self._wait(0)

    def _wait(self, most: int) -> None:
        with self._changed:
            while self._left > most:  # in slices: Ctrl-C is to be seen on every system
                self._changed.wait(1)
            if self._failure is not None:
                raise self._failure

    def end(self) -> None:
        """Take no more jobs; those under way are not waited for."""
        for _ in range(self._threads):
            self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            failure: BaseException | None = None
            try:
                if self._failure is None:
                    job()
            except BaseException as error:
                failure = error
            with self._changed:
                self._failure = self._failure or failure
                self._left -= 1
                self._changed.notify_all()
            self._room.release()
