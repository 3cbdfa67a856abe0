"""MiSS in its form "bat" (arXiv 2409.15371): each r×r tile of W times a tile, plus that tile."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from loratool.delta.by_rows import ByRows, RowMap, by_rows
from loratool.plan import DeltaPart


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


def build(
    fields: Mapping[str, torch.Tensor],
    part: DeltaPart,
    *,
    coefficient: float,
    dtype: torch.dtype,
    fold: bool = True,
) -> ByRows:
    """Make the delta of a ``tiles`` spec.

    Args:
        fields: miss_bat (out/r, r, r).
        part: the spec with orientation and region; bound.
        coefficient: weight.
        dtype: type of the accumulator.
        fold: no choice here.
    """
    out, inner = part.spec.row.sizes(part.spec)
    return by_rows(Tiles(fields["miss_bat"].to(dtype), coefficient), part, (out, inner[0]))
