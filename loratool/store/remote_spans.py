"""Reading ahead: what lies close together in a remote file comes in one request.

Who is going to read tensors says so first.  Their byte ranges are joined over small gaps and cut
into spans of bounded size; a span is fetched whole when its first byte is needed, those behind it
meanwhile, and kept while there is room.  A span that had to go is not fetched again: then each read
asks for its own bytes.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable
from typing import TYPE_CHECKING

from loratool.location import Location, RemoteFile

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

GAP_BYTES = 64 << 10
"""Read over rather than around: about what the way there and back costs."""
SPAN_BYTES = 8 << 20
KEPT_BYTES = 64 << 20
"""Memory for spans, whatever is read."""

Range = tuple[Location, int, int]
"""File, first byte, number of bytes."""


class _Span:
    """Bytes of a file that come in one request."""

    def __init__(self, start: int, stop: int) -> None:
        self.start, self.stop = start, stop
        self.lock = threading.Lock()
        self.was_fetched = False
        self.is_ahead = False  # on its way, or here, before anybody has asked
        self.left = stop - start  # bytes that nobody has read yet
        self.is_wanted = True


class ReadAhead:
    """Spans of any number of files, safe for several threads.

    Args:
        kept_bytes: of fetched spans at most.
    """

    def __init__(self, kept_bytes: int = KEPT_BYTES) -> None:
        self._most = kept_bytes
        self._lock = threading.Lock()
        self._spans: dict[RemoteFile, list[_Span]] = {}
        self._kept: OrderedDict[_Span, bytes] = OrderedDict()
        self._bytes = 0
        self._ahead: set[_Span] = set()  # half of the room at most: the rest is being read
        self._most_ahead = kept_bytes // (2 * SPAN_BYTES)
        self._pool: ThreadPoolExecutor | None = None

    def expect(self, file: RemoteFile, ranges: Iterable[tuple[int, int]]) -> None:
        """Say what will be read of a file: (start, stop) ranges, in any order.

        It takes the place of what was said before; spans that stay the same stay in memory.
        """
        made = [_Span(*cut) for cut in join(ranges)]
        with self._lock:
            old = {(s.start, s.stop): s for s in self._spans.get(file, ())}
            kept = [old.pop((s.start, s.stop), s) for s in made]
            for span in kept:
                span.was_fetched = span in self._kept
            self._spans[file] = kept
            self._forget(old.values())

    def clear(self) -> None:
        """Nothing more will be read."""
        with self._lock:
            for spans in self._spans.values():
                self._forget(spans)
            self._spans.clear()
            if self._pool is not None:
                self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None

    def read(self, file: RemoteFile, start: int, count: int) -> bytes:
        """Bytes of a file.

        Raises:
            HubError: see `loratool.store.remote.read_range`.
        """
        parts: list[bytes] = []
        at, stop = start, start + count
        while at < stop:
            span, until = self._find(file, at)
            until = min(until, stop)
            if span is None:
                parts.append(_fetch(file, at, until - at))
            else:
                parts.append(self._from(span, file, at, until))
            at = until
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _find(self, file: RemoteFile, at: int) -> tuple[_Span | None, int]:
        """The span at a position and its end; without one, where the next begins."""
        with self._lock:
            spans = self._spans.get(file, [])
        i = bisect_right(spans, at, key=lambda s: s.start)
        if i and at < spans[i - 1].stop:
            return spans[i - 1], spans[i - 1].stop
        return None, spans[i].start if i < len(spans) else file.size

    def _from(self, span: _Span, file: RemoteFile, at: int, until: int) -> bytes:
        self._hurry(span, file, until - at)
        data = self._load(span, file)
        if data is None:
            return _fetch(file, at, until - at)
        return data[at - span.start : until - span.start]

    def _load(self, span: _Span, file: RemoteFile) -> bytes | None:
        """The bytes of a span, None if they had to go."""
        with span.lock:  # the others wait for the one that fetches
            with self._lock:
                data = self._kept.get(span)
                if data is not None:
                    self._kept.move_to_end(span)
            if data is None and not span.was_fetched:
                data = _fetch(file, span.start, span.stop - span.start)
                span.was_fetched = True
                self._keep(span, data)
            return data

    def _hurry(self, span: _Span, file: RemoteFile, count: int) -> None:
        """Have those behind a span fetched while so many bytes of it are read."""
        with self._lock:
            span.left -= count
            self._ahead.discard(span)
            spans = self._spans.get(file, [])
            i = bisect_right(spans, span.start, key=lambda s: s.start)
            behind = [
                s for s in spans[i : i + self._most_ahead] if not (s.was_fetched or s.is_ahead)
            ]
            for one in behind[: max(0, self._most_ahead - len(self._ahead))]:
                one.is_ahead = True
                self._ahead.add(one)
                self._pool = self._pool or self._threads()
                self._pool.submit(self._load, one, file)  # who needs it has the error

    def _threads(self) -> ThreadPoolExecutor:
        from concurrent.futures import ThreadPoolExecutor  # files of this machine need none

        return ThreadPoolExecutor(self._most_ahead)

    def _keep(self, span: _Span, data: bytes) -> None:
        with self._lock:
            if not span.is_wanted:
                return
            self._kept[span] = data
            self._bytes += len(data)
            while self._bytes > self._most:
                read = (s for s in self._kept if s.left <= 0)
                self._drop([next(read, next(iter(self._kept)))])

    def _forget(self, spans: Iterable[_Span]) -> None:
        for span in spans:
            span.is_wanted = False
            self._drop([span])

    def _drop(self, spans: Iterable[_Span]) -> None:
        for span in spans:
            self._bytes -= len(self._kept.pop(span, b""))
            self._ahead.discard(span)


def join(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges joined over gaps of at most `GAP_BYTES`, then cut into at most `SPAN_BYTES`."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(r for r in ranges if r[0] < r[1]):
        if joined and start - joined[-1][1] <= GAP_BYTES:
            joined[-1] = (joined[-1][0], max(joined[-1][1], stop))
        else:
            joined.append((start, stop))
    return [
        (at, min(at + SPAN_BYTES, stop))
        for start, stop in joined
        for at in range(start, stop, SPAN_BYTES)
    ]


def remote_bytes(ranges: Iterable[Range]) -> int:
    """How much of these is remote; what overlaps counts once."""
    return sum(stop - start for parts in by_file(ranges).values() for start, stop in join(parts))


def by_file(ranges: Iterable[Range]) -> dict[RemoteFile, list[tuple[int, int]]]:
    """The (start, stop) ranges of remote files."""
    found: dict[RemoteFile, list[tuple[int, int]]] = {}
    for file, start, count in ranges:
        if isinstance(file, RemoteFile):
            found.setdefault(file, []).append((start, start + count))
    return found


def _fetch(file: RemoteFile, start: int, count: int) -> bytes:
    """One request; nothing of where it goes is imported before the first."""
    from loratool.store.remote import read_range

    return read_range(file, start, count)
