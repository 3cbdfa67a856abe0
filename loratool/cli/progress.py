"""Progress on stderr: bytes, rate and time left."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

from loratool.cli.render import format_bytes, format_seconds, is_terminal

_PLAIN_EVERY_S, _BAR_EVERY_S = 5.0, 0.1

Progress = Callable[[int, int], None]


@contextmanager
def show_progress(*, quiet: bool) -> Iterator[Progress | None]:
    """A callback ``(bytes done, bytes in all)`` that shows them.

    On a terminal a bar; elsewhere a plain line every few seconds; with ``quiet`` nothing.
    """
    if quiet:
        yield None
    elif is_terminal(sys.stderr) and os.environ.get("TERM") != "dumb":
        with _bar() as update:
            yield update
    else:
        yield _PlainLines()


@contextmanager
def _bar() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    bar = Bar(
        BarColumn(bar_width=28),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=Console(stderr=True),
        transient=True,
        auto_refresh=False,  # its thread would stand in the way of copies of this process
    )
    due = _Due(_BAR_EVERY_S)
    with bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total, refresh=due())


class _Due:
    """True once in a while."""

    def __init__(self, every: float) -> None:
        self._every, self._last = every, time.monotonic()

    def __call__(self) -> bool:
        now = time.monotonic()
        if now - self._last < self._every:
            return False
        self._last = now
        return True


class _PlainLines:
    """One line every few seconds, for logs; short runs stay silent."""

    def __init__(self) -> None:
        self._started, self._is_due = time.monotonic(), _Due(_PLAIN_EVERY_S)

    def __call__(self, done: int, total: int) -> None:
        if not self._is_due():
            return
        rate = done / (time.monotonic() - self._started)
        left = f", {format_seconds((total - done) / rate)} left" if rate > 0 else ""
        click.echo(
            f"{format_bytes(done)} of {format_bytes(total)}, {format_bytes(rate)}/s{left}", err=True
        )
