"""W + Σ factor · left @ right, several blocks in one call."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor

from loratool.delta.base import Delta, Product
from loratool.delta.lowrank import lengths
from loratool.engine import grid
from loratool.frozen import Frozen
from loratool.linalg.one_call import OneCall

TOGETHER = 2
"""Blocks that are widened and rounded in one go: sums of more leave the cache."""


class Products(Frozen, dict=True):
    """What is added to a matrix.

    Attributes:
        all: the products.
        cols: of the matrix.
    """

    all: Sequence[Product]
    cols: int

    @classmethod
    def of(cls, deltas: Sequence[Delta], cols: int) -> Products | None:
        """What deltas add; None if that is not just products.

        Args:
            deltas: all of them.
            cols: of their matrix.
        """
        found = [delta.products() for delta in deltas]
        return None if None in found else cls([one for some in found for one in some or ()], cols)

    @cached_property
    def _lists(self) -> tuple[list[Tensor], list[Tensor], list[float], list[int], list[int]]:
        return [one.left for one in self.all], [one.right for one in self.all], *self._places

    @cached_property
    def _lengths(self) -> tuple[list[Tensor], list[Tensor], list[float], list[int], list[int]]:
        found = [lengths(one.left, one.right) for one in self.all]
        return [rows for rows, _ in found], [cols for _, cols in found], *self._places

    @property
    def _places(self) -> tuple[list[float], list[int], list[int]]:
        tops, sides = [one.top for one in self.all], [one.side for one in self.all]
        return [one.factor for one in self.all], tops, sides

    def add(self, base: Tensor, acc: Tensor, starts: list[int], rows: Wanted) -> list[Tensor]:
        """Sum neighbouring blocks of whole rows, each product formed on one of them.

        Args:
            base: (n,) those rows of W, any float type.
            acc: (1, n) float32 or float64, gets the sums.
            starts: the rows of W at which blocks begin, and where the last one ends.
            rows: those whose sums are wanted.

        Returns:
            (rows, cols) of each block in ``rows``, the type of ``acc``.
        """
        return _add(
            base, acc, acc, False, self.cols, len(starts), starts, rows.firsts, rows.stride,
            *self._lists,
        )  # fmt: skip

    def merge(
        self, base: Tensor, bits: Tensor, acc: Tensor, out: Tensor, starts: list[int], rows: Wanted
    ) -> tuple[bool, list[Tensor], list[Tensor]]:
        """The same, rounded as torch rounds, and `look`.

        Args:
            base: as of `add`.
            bits: as of `look`.
            acc: scratch for `TOGETHER` of the blocks.
            out: (n,) gets the numbers.
            starts: as of `add`.
            rows: as of `add`.

        Returns:
            What `add` returns after what `look` does.
        """
        return _merge(base, acc, out, self.cols, TOGETHER, starts, *self._lists, bits, *rows)

    def bound(
        self, base: Tensor, acc: Tensor, work: Tensor, low: Tensor, high: Tensor,
        starts: list[int], unit: float,
    ) -> None:  # fmt: skip
        """Round both ends of the intervals in which the exact sums of some rows lie.

        Args:
            base: (n,) those rows of W.
            acc: (n,) float32, their sums.
            work: scratch of that type, two rows as long as the largest block.
            low: (n,) gets the lower ends.
            high: (n,) gets the upper ends.
            starts: as of `add`.
            unit: how far off a sum may be, in Σ|terms|.
        """
        _bound(base, acc, work, low, high, self.cols, starts, unit, *self._lengths)


class Wanted(NamedTuple):
    """Rows of some blocks of a piece that are wanted.

    Attributes:
        starts: where the blocks begin in the piece, in elements.
        firsts: their first rows in W.
        heights: numbers of rows.
        widths: of columns.
        stride: of the rows of W that are wanted.
    """

    starts: list[int]
    firsts: list[int]
    heights: list[int]
    widths: list[int]
    stride: int

    @classmethod
    def of(cls, blocks: Sequence[grid.Block], start: int, stride: int) -> Wanted:
        """Those of blocks of a piece that begins at element ``start`` of W."""
        return cls(
            [block.start - start for block in blocks], [block.r0 for block in blocks],
            [block.r1 - block.r0 for block in blocks], [block.c1 - block.c0 for block in blocks],
            stride,
        )  # fmt: skip


def look(base: Tensor, bits: Tensor, out: Tensor, rows: Wanted) -> tuple[bool, list[Tensor]]:
    """See whether a merged piece is as nearly all are, and copy some rows of both.

    Args:
        base: (n,) what W was there.
        bits: the same as integers, of which -0 is the lowest.
        out: (n,) what it has become, finite or not.
        rows: which.

    Returns:
        True if the base holds no -0 that could have lost its sign, and the output neither infinity
        nor NaN; rows of the base and of the output, by turns.
    """
    return _look(base, bits, out, *rows)


@OneCall
def _look(
    base: Tensor, bits: Tensor, out: Tensor, starts: list[int], firsts: list[int],
    heights: list[int], widths: list[int], stride: int,
) -> tuple[bool, list[Tensor]]:  # fmt: skip
    """See `look`."""
    rows: list[Tensor] = []
    if base.dtype == out.dtype and int(bits.min()) == -1 << (8 * bits.element_size() - 1):
        return False, rows
    low, high = torch.aminmax(out)
    if not bool(torch.isfinite(low)) or not bool(torch.isfinite(high)):
        return False, rows
    for i in range(len(starts)):
        end = starts[i] + heights[i] * widths[i]
        for one in [base, out]:
            block = one[starts[i] : end].view(heights[i], widths[i])
            rows.append(block[-firsts[i] % stride :: stride].clone())
    return True, rows


@OneCall
def _add(
    base: Tensor, acc: Tensor, out: Tensor, rounds: bool, cols: int, together: int,
    starts: list[int], kept: list[int], stride: int,
    left: list[Tensor], right: list[Tensor], factor: list[float], top: list[int], side: list[int],
) -> list[Tensor]:  # fmt: skip
    """See `Products.add` and `Products.merge`; ``out`` is filled if it ``rounds``."""
    rows: list[Tensor] = []
    count = len(starts) - 1
    for i in range(0, count, together):
        first, end = starts[i], starts[min(i + together, count)]
        at, size = (first - starts[0]) * cols, (end - first) * cols
        sums = acc[0, :size]
        narrow = base[at : at + size]
        if base.dtype == torch.float16 and acc.dtype == torch.float64:
            narrow = narrow.float()  # torch's own way is slow
        sums.copy_(narrow)
        for k in range(i, min(i + together, count)):
            r0, r1 = starts[k], starts[k + 1]
            block = sums[(r0 - first) * cols : (r1 - first) * cols].view(r1 - r0, cols)
            for n in range(len(left)):
                low, high = max(r0, top[n]), min(r1, top[n] + left[n].size(0))
                if low < high:
                    part = block[low - r0 : high - r0, side[n] : side[n] + right[n].size(1)]
                    part.addmm_(left[n][low - top[n] : high - top[n]], right[n], alpha=factor[n])
            if r0 in kept:
                rows.append(block[-r0 % stride :: stride].clone())
        if rounds:
            out[at : at + size].copy_(sums)
    return rows


@partial(OneCall, uses=[_look, _add])
def _merge(
    base: Tensor, acc: Tensor, out: Tensor, cols: int, together: int, starts: list[int],
    left: list[Tensor], right: list[Tensor], factor: list[float], top: list[int], side: list[int],
    bits: Tensor, places: list[int], firsts: list[int], heights: list[int], widths: list[int],
    stride: int,
) -> tuple[bool, list[Tensor], list[Tensor]]:  # fmt: skip
    """See `Products.merge`."""
    sums = _add(base, acc, out, True, cols, together, starts, firsts, stride,
                left, right, factor, top, side)  # fmt: skip
    is_simple, ends = _look(base, bits, out, places, firsts, heights, widths, stride)
    return is_simple, ends, sums


@OneCall
def _bound(
    base: Tensor, acc: Tensor, work: Tensor, low: Tensor, high: Tensor, cols: int,
    starts: list[int], unit: float,
    heights: list[Tensor], widths: list[Tensor], factor: list[float], top: list[int],
    side: list[int],
) -> None:  # fmt: skip
    """See `Products.bound`; Σ|terms| by the lengths of the factors' rows and columns."""
    for k in range(len(starts) - 1):
        start, end = starts[k], starts[k + 1]
        at, till = (start - starts[0]) * cols, (end - starts[0]) * cols
        error, upper = work[0, : till - at], work[1, : till - at]
        error.copy_(base[at:till]).abs_()
        block = error.view(end - start, cols)
        for n in range(len(heights)):
            r0, r1 = max(start, top[n]), min(end, top[n] + heights[n].size(0))
            if r0 < r1:
                part = block[r0 - start : r1 - start, side[n] : side[n] + widths[n].size(0)]
                part.addr_(heights[n][r0 - top[n] : r1 - top[n]], widths[n], alpha=abs(factor[n]))
        torch.add(acc[at:till], error, alpha=unit, out=upper)
        torch.sub(acc[at:till], error, alpha=unit, out=error)
        low[at:till].copy_(error)
        high[at:till].copy_(upper)
