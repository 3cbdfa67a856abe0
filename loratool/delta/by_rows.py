"""Changes whose rows depend on whole rows of W: rotations, what goes through W, tiles."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch

from loratool.delta.base import Delta, Loaded

Fetch = Callable[[int, int], torch.Tensor]
"""Rows of W from the first to one past the last, all columns, as the base stores them."""


class RowMap(ABC):
    """Rows of W (out, in·k…) -> the same rows of W' - W.

    Attributes:
        multiple: rows belong together in so many, from the first on; 0 = all of them do.
        roundings: how often one element of the result is rounded.
    """

    multiple: int = 1
    roundings: int = 0

    @abstractmethod
    def change(self, weight: torch.Tensor, row: int) -> torch.Tensor:
        """The change of some rows.

        Args:
            weight: (n, columns) float32 or float64; n is a multiple of `multiple`.
            row: number of the first one, in the whole change.
        """

    @abstractmethod
    def size(self, weight: torch.Tensor, row: int) -> torch.Tensor:
        """An upper bound of Σ|terms| of the same rows; ``weight`` holds |W|."""

    @abstractmethod
    def scaled(self, factor: float) -> RowMap:
        """The same change at ``factor`` times the strength."""

    @abstractmethod
    def to(self, device: torch.device) -> None:
        """Put its tensors on a device, in place."""


class ByRows(Delta):
    """A change of a matrix by a `RowMap`; what a block lacks of W is read again.

    Args:
        change: of rows of W.
        shape: (rows, cols) of the matrix, as it is stored.
        row: number of the matrix's first row in the change, where it covers a slice of it.
        transposed: the matrix is stored (in, out): then all of it is needed at once.
    """

    is_additive = False
    needs_rows = True

    def __init__(
        self, change: RowMap, shape: tuple[int, int], row: int = 0, transposed: bool = False
    ) -> None:
        self.change, self.shape, self.roundings = change, shape, change.roundings + 2
        self._row, self._transposed = row, transposed
        self._multiple = 0 if transposed else change.multiple
        self._fetch: Fetch | None = None
        self._whole: dict[bool, torch.Tensor] = {}
        self._lock = threading.Lock()

    def attach(self, fetch: Fetch) -> None:
        """Keep how to read rows of W."""
        self._fetch = fetch

    def add_to(
        self, acc: torch.Tensor, base: torch.Tensor, r0: int, r1: int, c0: int, c1: int
    ) -> None:
        """Add the block of the rows' change."""
        acc.add_(self._block(base, r0, r1, is_size=False)[:, c0:c1])

    def add_size(
        self, acc: torch.Tensor, base: torch.Tensor, r0: int, r1: int, c0: int, c1: int
    ) -> None:
        """Σ|terms| of the rows' change."""
        acc.add_(self._block(base, r0, r1, is_size=True)[:, c0:c1])

    def _block(self, base: torch.Tensor, r0: int, r1: int, *, is_size: bool) -> torch.Tensor:
        if not self._multiple:
            with self._lock:
                if is_size not in self._whole:
                    weight = self._rows(base, 0, self.shape[0])
                    weight = weight.T if self._transposed else weight
                    found = self._work(weight, 0, is_size=is_size)
                    self._whole[is_size] = found.T if self._transposed else found
            return self._whole[is_size][r0:r1].to(base.dtype)
        start = r0 - r0 % self._multiple
        stop = min(-(-r1 // self._multiple) * self._multiple, self.shape[0])
        is_here = (start, stop, base.shape[1]) == (r0, r1, self.shape[1])
        weight = base if is_here else self._rows(base, start, stop)
        return self._work(weight, start, is_size=is_size)[r0 - start : r1 - start]

    def _work(self, weight: torch.Tensor, row: int, *, is_size: bool) -> torch.Tensor:
        row += self._row
        return self.change.size(weight.abs(), row) if is_size else self.change.change(weight, row)

    def _rows(self, base: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        assert self._fetch is not None
        return self._fetch(start, stop).to(base.device, base.dtype)

    def scaled(self, factor: float) -> ByRows:
        """Scales the map."""
        made = ByRows(self.change.scaled(factor), self.shape, self._row, self._transposed)
        made._fetch = self._fetch
        return made

    def to(self, device: torch.device) -> None:
        """Moves the map."""
        self.change.to(device)


def by_rows(change: RowMap, given: Loaded) -> ByRows:
    """A map laid on a part's matrix.

    Args:
        change: of the whole change, (out, in·k…).
        given: its part has orientation and region.
    """
    part, (out, inner) = given.part, given.sizes
    cut = part.region.source_cols if part.transposed else part.region.source_rows
    first, last = cut or (0, out)
    shape = (inner, last - first) if part.transposed else (last - first, inner)
    return ByRows(change, shape, first, part.transposed)
