"""Progress on stderr: how much is done, the rate, the time left, and what is at work."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from loratool.cli.render import (
    format_bytes,
    format_seconds,
    is_terminal,
    safe,
    short,
    terminal_width,
)

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

_PLAIN_EVERY_S, _BAR_EVERY_S = 5.0, 0.1
_BAR_AFTER_S = 0.4  # shorter runs show no bar, and do not load what draws it
_BAR_WIDTH, _NUMBERS_WIDTH, _LEAST_NAME = 28, 46, 16

Watchers = dict[str, Any]


@contextmanager
def show_progress(*, quiet: bool, unit: str = "bytes") -> Iterator[Watchers]:
    """Options ``progress`` and ``on_work`` of a function of the library, which show both.

    On a terminal a bar; elsewhere a plain line every few seconds; with ``quiet`` none at all.

    Args:
        quiet: show nothing.
        unit: of the counts: ``bytes`` or ``files``.
    """
    if quiet:
        yield {}
        return
    is_watched = is_terminal(sys.stderr) and os.environ.get("TERM") != "dumb"
    shown = _Drawn(unit) if is_watched else _PlainLines(unit)
    try:
        yield {"progress": shown.progress, "on_work": shown.on_work}
    finally:
        shown.close()


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


class _Shown:
    """What is done and what is at work, from any thread; subclasses show it now and then."""

    every = _BAR_EVERY_S

    def __init__(self, unit: str) -> None:
        self.unit, self.started = unit, 0.0
        self.done, self.total, self.name = 0, 0, ""
        self._is_due: _Due | None = None
        self._lock = threading.Lock()

    def progress(self, done: int, total: int) -> None:
        """As the option."""
        with self._lock:
            self.done, self.total = done, total
            self._now_and_then()

    def on_work(self, name: str) -> None:
        """As the option; the name is foreign text."""
        with self._lock:
            self.name = name
            self._now_and_then()

    def _now_and_then(self) -> None:
        if self._is_due is None:  # time counts from the first sign of work
            self.started, self._is_due = time.monotonic(), _Due(self.every)
        elif self.total and self._is_due():
            self.show()

    def show(self) -> None:
        """Show the state."""
        raise NotImplementedError

    def close(self) -> None:
        """Nothing more comes."""


class _Drawn(_Shown):
    """A bar that goes away at the end."""

    _bar: Bar | None = None

    def show(self) -> None:
        """Draw the bar anew; a run that is short does not begin one."""
        if self._bar is None and time.monotonic() - self.started < _BAR_AFTER_S:
            return
        room = terminal_width() - _BAR_WIDTH - _NUMBERS_WIDTH
        name = short(safe(self.name), room, at_start=True) if room >= _LEAST_NAME else ""
        if self._bar is None:
            self._bar = _bar(self.unit)
            self._task = self._bar.add_task("", total=self.total, name=name)
            self._bar.tasks[0].start_time = self.started
            self._bar.start()
        self._bar.update(self._task, completed=self.done, total=self.total, name=name, refresh=True)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()


def _bar(unit: str) -> Bar:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as Bar
    from rich.text import Text

    class Rate(TransferSpeedColumn):
        def render(self, task: Any) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{speed:.1f} {unit}/s" if speed else "", style="progress.data.speed")

    is_bytes = unit == "bytes"
    return Bar(
        BarColumn(bar_width=_BAR_WIDTH),
        DownloadColumn() if is_bytes else MofNCompleteColumn(),
        TransferSpeedColumn() if is_bytes else Rate(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[name]}", markup=False),
        console=Console(stderr=True),
        transient=True,
        auto_refresh=False,  # its thread would stand in the way of copies of this process
    )


class _PlainLines(_Shown):
    """One line every few seconds, for logs; short runs stay silent."""

    every = _PLAIN_EVERY_S

    def show(self) -> None:
        """Print a line; the end is said by what comes after it."""
        if self.done >= self.total:
            return
        rate = self.done / (time.monotonic() - self.started)
        left = f", {format_seconds((self.total - self.done) / rate)} left" if rate > 0 else ""
        name = f": {safe(self.name)}" if self.name else ""
        if self.unit == "bytes":
            counts = f"{format_bytes(self.done)} of {format_bytes(self.total)}"
            speed = format_bytes(rate)
        else:
            counts = f"{self.done:,} of {self.total:,} {self.unit}"
            speed = f"{rate:,.1f}"
        click.echo(f"{counts}, {speed}/s{left}{name}", err=True)
