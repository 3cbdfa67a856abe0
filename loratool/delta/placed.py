"""A delta laid on part of a bigger tensor: a slice of a fused projection, one expert of many."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from loratool.delta.base import Delta, Product
from loratool.frozen import replace
from loratool.plan import Region, Span


class Placed(Delta):
    """Puts ``inner`` on the rows and columns of a region; the rest of the tensor stays.

    Args:
        inner: a delta whose shape is (number of rows, number of columns) of the region.
        region: spans of the target's 2-D view; empty = all.
        shape: (rows, cols) of the target's 2-D view.
        device: where blocks will live.
    """

    def __init__(
        self, inner: Delta, region: Region, shape: tuple[int, int], device: torch.device
    ) -> None:
        self.inner = inner
        self.shape = shape
        self.is_additive = inner.is_additive
        self.roundings = inner.roundings
        self._region = region
        self._device = device
        self._rows = _Axis(region.rows, shape[0], device)
        self._cols = _Axis(region.cols, shape[1], device)

    @property
    def needs_measure(self) -> bool:
        """As the inner delta."""
        return self.inner.needs_measure

    def measure(self, base: torch.Tensor, r0: int, r1: int, c0: int, c1: int) -> None:
        """Passes on the part of the block that lies in the region."""
        rows, cols = self._rows.cut(r0, r1), self._cols.cut(c0, c1)
        if rows is not None and cols is not None:
            block = base[rows.select][:, cols.select]
            self.inner.measure(block, rows.start, rows.stop, cols.start, cols.stop)

    @property
    def needs_rows(self) -> bool:  # type: ignore[override]
        """As the inner delta."""
        return self.inner.needs_rows

    def attach(self, fetch: Callable[[int, int], torch.Tensor]) -> None:
        """Passes on rows of the region."""
        self.inner.attach(partial(self._fetch, fetch))

    def _fetch(
        self, fetch: Callable[[int, int], torch.Tensor], start: int, stop: int
    ) -> torch.Tensor:
        rows = self._rows.places(start, stop)
        first, last = int(rows[0]), int(rows[-1]) + 1
        found = fetch(first, last)
        rows, cols = rows.to(found.device) - first, self._cols.places(0, self.inner.shape[1])
        return found[rows][:, cols.to(found.device)]

    @property
    def wants_survey(self) -> bool:
        """As the inner delta."""
        return self.inner.wants_survey

    def survey(self, like: torch.Tensor, r0: int, r1: int, c0: int, c1: int) -> None:
        """Passes on the part of the block that lies in the region."""
        rows, cols = self._rows.cut(r0, r1), self._cols.cut(c0, c1)
        if rows is not None and cols is not None:
            self.inner.survey(like, rows.start, rows.stop, cols.start, cols.stop)

    def end_survey(self) -> None:
        """As the inner delta."""
        self.inner.end_survey()

    def within(
        self, block: torch.Tensor, r0: int, r1: int, c0: int, c1: int
    ) -> tuple[torch.Tensor, tuple[int, int, int, int]] | None:
        """The part of a block in the region and its place in the inner delta; None if outside."""
        rows, cols = self._rows.cut(r0, r1), self._cols.cut(c0, c1)
        if rows is None or cols is None:
            return None
        place = (rows.start, rows.stop, cols.start, cols.stop)
        return block[rows.select][:, cols.select], place

    def add_to(
        self, acc: torch.Tensor, base: torch.Tensor, r0: int, r1: int, c0: int, c1: int
    ) -> None:
        """Adds to the part of the block that lies in the region."""
        self._inside(self.inner.add_to, acc, base, r0, r1, c0, c1)

    def products(self) -> list[Product] | None:
        """Those of the inner delta, moved, where the region is a rectangle."""
        found = self.inner.products()
        if found is None or not (self._rows.plain and self._cols.plain):
            return None
        top, side = self._rows.spans[0].start, self._cols.spans[0].start
        return [replace(one, top=one.top + top, side=one.side + side) for one in found]

    def add_size(
        self, acc: torch.Tensor, base: torch.Tensor, r0: int, r1: int, c0: int, c1: int
    ) -> None:
        """Adds to the part of the block that lies in the region."""
        self._inside(self.inner.add_size, acc, base, r0, r1, c0, c1)

    def _inside(
        self,
        add: Callable[[torch.Tensor, torch.Tensor, int, int, int, int], None],
        acc: torch.Tensor,
        base: torch.Tensor,
        r0: int,
        r1: int,
        c0: int,
        c1: int,
    ) -> None:
        rows, cols = self._rows.cut(r0, r1), self._cols.cut(c0, c1)
        if rows is None or cols is None:
            return
        place = (rows.start, rows.stop, cols.start, cols.stop)
        if isinstance(rows.select, slice) and isinstance(cols.select, slice):
            part = acc[rows.select, cols.select]
            add(part, base[rows.select, cols.select], *place)
            return
        part = acc[rows.select][:, cols.select].contiguous()
        add(part, base[rows.select][:, cols.select], *place)
        acc[_index(rows, r0, r1, self._device)[:, None], _index(cols, c0, c1, self._device)] = part

    def single(self) -> Placed | None:
        """That of the inner delta, in the same place."""
        inner = self.inner.single()
        if inner is None:
            return None
        return Placed(inner, self._region, self.shape, self._device)

    def at(self, rows: torch.Tensor, cols: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of the inner delta at the places inside the region, zeros outside."""
        row, col = self._rows.find(rows), self._cols.find(cols)
        inside = (row >= 0) & (col >= 0)
        both = rows.new_zeros(2, len(rows), dtype=torch.float64)
        both[:, inside] = torch.stack(self.inner.at(row[inside], col[inside]))
        return both[0], both[1]

    def terms(self, rows: torch.Tensor, cols: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """Those of the inner delta at the places inside the region, zeros outside."""
        row, col = self._rows.find(rows), self._cols.find(cols)
        inside = (row >= 0) & (col >= 0)
        found = self.inner.terms(row[inside], col[inside], base[inside])
        out = torch.zeros(len(rows), found.shape[1], dtype=torch.float64)
        out[inside] = found
        return out

    def scaled(self, factor: float) -> Placed:
        """Scales the inner delta."""
        return Placed(self.inner.scaled(factor), self._region, self.shape, self._device)

    def to(self, device: torch.device) -> None:
        """Moves the inner delta; positions lie on the device that it was made for."""
        self.inner.to(device)


class _Cut:
    """Where a block meets an axis of a region: positions in the block, range in the delta."""

    def __init__(self, select: slice | torch.Tensor, start: int, stop: int) -> None:
        self.select = select
        self.start = start
        self.stop = stop


class _Axis:
    """One axis of a region: an offset for a single plain span, else the list of positions.

    The delta's rows follow the spans in order; spans must ascend, so that the rows of one block
    are a contiguous range of the delta's rows.
    """

    def __init__(self, spans: tuple[Span, ...], size: int, device: torch.device) -> None:
        self.spans = spans or (Span(0, size),)
        self.plain = len(self.spans) == 1 and self.spans[0].step == 1
        if not self.plain:
            pieces = [torch.arange(s.start, s.stop, s.step) for s in self.spans]
            self.positions = torch.cat(pieces)
            if bool((self.positions[1:] <= self.positions[:-1]).any()):
                raise ValueError("spans of a region must ascend")
            self.on_device = self.positions.to(device)

    def find(self, positions: torch.Tensor) -> torch.Tensor:
        """Index in the delta of each position of the target, -1 outside of the region."""
        if self.plain:
            span = self.spans[0]
            inside = (positions >= span.start) & (positions < span.stop)
            return torch.where(inside, positions - span.start, -1)
        known = self.on_device if positions.device == self.on_device.device else self.positions
        index = torch.searchsorted(known, positions).clamp_max(len(known) - 1)
        return torch.where(known[index] == positions, index, -1)

    def places(self, start: int, stop: int) -> torch.Tensor:
        """Positions in the target of a range of the delta's own."""
        if self.plain:
            first = self.spans[0].start
            return torch.arange(first + start, first + stop)
        return self.positions[start:stop]

    def cut(self, start: int, stop: int) -> _Cut | None:
        if self.plain:
            span = self.spans[0]
            low, high = max(start, span.start), min(stop, span.stop)
            if low >= high:
                return None
            return _Cut(slice(low - start, high - start), low - span.start, high - span.start)
        bounds = torch.tensor([start, stop])
        first, last = torch.searchsorted(self.positions, bounds).tolist()
        if first >= last:
            return None
        return _Cut(self.on_device[first:last] - start, first, last)


def _index(cut: _Cut, start: int, stop: int, device: torch.device) -> torch.Tensor:
    if isinstance(cut.select, slice):
        return torch.arange(start, stop, device=device)[cut.select] - start
    return cut.select
