"""MiSS in its form "bat" (arXiv 2409.15371): each r×r tile of W times a tile, plus that tile."""

from __future__ import annotations

import torch

from loratool.delta.base import Loaded
from loratool.delta.by_rows import ByRows, RowMap, by_rows


class Tiles(RowMap):
    """ΔW = W_ij b_i + b_i for the tiles of every row i of tiles.

    Args:
        tiles: (out/r, r, r) float32 or float64.
        coefficient: of the change.
    """

    def __init__(self, tiles: torch.Tensor, coefficient: float = 1.0) -> None:
        self.tiles, self.coefficient = tiles, coefficient
        self.multiple = tiles.shape[1]
        self.roundings = tiles.shape[1] + 2

    def change(self, weight: torch.Tensor, row: int) -> torch.Tensor:
        """One product per row of tiles."""
        return self._of(weight, row, self.tiles, self.coefficient)

    def size(self, weight: torch.Tensor, row: int) -> torch.Tensor:
        """The same of absolute values."""
        return self._of(weight, row, self.tiles.abs(), abs(self.coefficient))

    def _of(
        self, weight: torch.Tensor, row: int, tiles: torch.Tensor, coefficient: float
    ) -> torch.Tensor:
        r, (rows, cols) = tiles.shape[1], weight.shape
        own = tiles[row // r : (row + rows) // r].to(weight.dtype)[:, None]  # (n, 1, r, r)
        cells = weight.view(rows // r, r, cols // r, r).transpose(1, 2)
        return (cells @ own + own).transpose(1, 2).reshape(rows, cols).mul_(coefficient)

    def scaled(self, factor: float) -> Tiles:
        """Multiplies the coefficient."""
        return Tiles(self.tiles, self.coefficient * factor)

    def to(self, device: torch.device) -> None:
        """Moves the tiles."""
        self.tiles = self.tiles.to(device)


def build(given: Loaded) -> ByRows:
    """Make the delta of a ``tiles`` spec.

    Args:
        given: miss_bat (out/r, r, r).
    """
    return by_rows(Tiles(given.fields["miss_bat"].to(given.dtype), given.coefficient), given)
