"""Several things one after the other, and whoever watches them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from loratool.frozen import Struct

T = TypeVar("T")


class Turns(Struct):
    """Tells what is at work, and how much of all is done.

    Attributes:
        progress: called with (done, in all); None = nobody asks.
        on_work: called with a name; of several with its number.
        sizes: of the things, in bytes, or ones to count them.
    """

    progress: Callable[[int, int], None] | None = None
    on_work: Callable[[str], None] | None = None
    sizes: Sequence[int] = ()
    _before: int = 0
    _now: int = 0
    _most: int = 0

    def each(self, things: Sequence[T], name: Callable[[T], str]) -> Iterator[T]:
        """The things; each is done when the next one is asked for."""
        for number, (thing, size) in enumerate(zip(things, self.sizes, strict=True), 1):
            if self.on_work is not None:
                of = f" ({number} of {len(things)})" if len(things) > 1 else ""
                self.on_work(name(thing) + of)
            self._now = size
            yield thing
            self._before += size
            self._now = 0
            self._tell(self._before)

    def part(self, start: float, stop: float) -> Callable[[int, int], None]:
        """A callback (done, in all) for a part of the thing at work, from one share to another."""

        def progress(done: int, total: int) -> None:
            share = start + (stop - start) * done / total
            self._tell(self._before + int(self._now * share))

        return progress

    def _tell(self, done: int) -> None:
        """Never backwards: a pass may be made once more."""
        self._most = max(self._most, done)
        if self.progress is not None:
            self.progress(self._most, max(1, sum(self.sizes)))
