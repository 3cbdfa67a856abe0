"""C3A (arXiv 2407.19342): every b×b block of ΔW is a circulant, a vector turned once per row."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from loratool.adapter import DeltaSpec
from loratool.delta.base import Delta, Loaded
from loratool.delta.lowrank import Pair, thinnest
from loratool.linalg.exact import product_terms


class Circulant(Delta):
    """ΔW[p·b + x, q·b + y] = coefficient · kernel[p, q, (y - x) mod b].

    Args:
        kernel: (rows/b, cols/b, b) float32 or float64.
        coefficient: of the change.
        rows: (start, stop) of the part of it that this is, None = all.
        cols: the same of columns.
    """

    roundings = 2

    def __init__(
        self,
        kernel: torch.Tensor,
        coefficient: float = 1.0,
        rows: tuple[int, int] | None = None,
        cols: tuple[int, int] | None = None,
    ) -> None:
        self.kernel, self.coefficient = kernel, coefficient
        count, wide, b = kernel.shape
        self._rows, self._cols = rows or (0, count * b), cols or (0, wide * b)
        self.shape = (self._rows[1] - self._rows[0], self._cols[1] - self._cols[0])

    def add_to(
        self, acc: torch.Tensor, base: torch.Tensor, r0: int, r1: int, c0: int, c1: int
    ) -> None:
        """Every row turned to its place."""
        acc.add_(self._block(r0, r1, c0, c1).to(acc.dtype), alpha=self.coefficient)

    def add_size(
        self, acc: torch.Tensor, base: torch.Tensor, r0: int, r1: int, c0: int, c1: int
    ) -> None:
        """|coefficient · kernel|."""
        size = self._block(r0, r1, c0, c1).abs().to(acc.dtype)
        acc.add_(size, alpha=abs(self.coefficient))

    def _block(self, r0: int, r1: int, c0: int, c1: int) -> torch.Tensor:
        b, device = self.kernel.shape[2], self.kernel.device
        (row, _), (col, _) = self._rows, self._cols
        rows = torch.arange(row + r0, row + r1, device=device)
        turn = (torch.arange(b, device=device) - rows[:, None]) % b  # (n, b)
        blocks = self.kernel[rows // b]  # (n, cols/b, b)
        return blocks.gather(2, turn[:, None].expand_as(blocks)).flatten(1)[:, col + c0 : col + c1]

    def terms(self, rows: torch.Tensor, cols: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """One product."""
        device, b = self.kernel.device, self.kernel.shape[2]
        rows, cols = rows.to(device) + self._rows[0], cols.to(device) + self._cols[0]
        values = self.kernel[rows // b, cols // b, (cols - rows) % b].double().cpu()
        factor = torch.full((1, 1), self.coefficient, dtype=torch.float64)
        return product_terms(values[:, None], factor)

    def scaled(self, factor: float) -> Circulant:
        """Multiplies the coefficient."""
        return Circulant(self.kernel, self.coefficient * factor, self._rows, self._cols)

    def to(self, device: torch.device) -> None:
        """Moves the kernel."""
        self.kernel = self.kernel.to(device)


def build(given: Loaded) -> Circulant:
    """Make the delta of a ``circulant`` spec.

    Args:
        given: c3a_kernel (out/b, in/b, b).
    """
    part = given.part
    kernel, coefficient = given.folded(given.fields["c3a_kernel"])
    if part.transposed:  # turned the other way
        kernel = kernel.transpose(0, 1).flip(2).roll(1, 2)
    region = part.region
    return Circulant(kernel.to(given.dtype), coefficient, region.source_rows, region.source_cols)


def pairs_of(fields: Mapping[str, torch.Tensor], spec: DeltaSpec) -> list[Pair]:
    """ΔW (out, in) in float64 beside the identity: nothing thinner has the same product."""
    kernel = fields["c3a_kernel"].double()
    return [thinnest(Circulant(kernel).dense())]
