"""SHiRA (arXiv 2406.13175): single elements of W change, and no others."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from loratool.adapter import DeltaSpec
from loratool.delta.base import Delta, Loaded
from loratool.delta.lowrank import Pair, thinnest
from loratool.errors import BadFileError
from loratool.linalg.exact import product_terms
from loratool.plan import DeltaPart


class Sparse(Delta):
    """ΔW is zero but for some elements.

    Args:
        shape: of the matrix.
        rows: (n,) int64 row numbers.
        cols: (n,) int64 column numbers.
        values: (n,) float32 or float64; of elements that are named twice both count.
        coefficient: of all of them.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        rows: torch.Tensor,
        cols: torch.Tensor,
        values: torch.Tensor,
        coefficient: float = 1.0,
    ) -> None:
        order = torch.argsort(rows * shape[1] + cols, stable=True)
        self.shape, self.roundings, self.coefficient = shape, 3, coefficient
        self.rows, self.cols, self.values = rows[order], cols[order], values[order]

    def add_to(
        self, acc: torch.Tensor, base: torch.Tensor, r0: int, r1: int, c0: int, c1: int
    ) -> None:
        """Touches only the elements inside the block."""
        at, values = self._inside(r0, r1, c0, c1)
        acc.index_put_(at, values.to(acc.dtype) * self.coefficient, accumulate=True)

    def add_size(
        self, acc: torch.Tensor, base: torch.Tensor, r0: int, r1: int, c0: int, c1: int
    ) -> None:
        """|value| at the elements inside the block."""
        at, values = self._inside(r0, r1, c0, c1)
        size = values.abs().to(acc.dtype) * abs(self.coefficient)
        acc.index_put_(at, size, accumulate=True)

    def terms(self, rows: torch.Tensor, cols: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """One product for each time that an element is named."""
        width = self.shape[1]
        named, wanted = (self.rows * width + self.cols).cpu(), rows.cpu() * width + cols.cpu()
        first = torch.searchsorted(named, wanted)
        count = torch.searchsorted(named, wanted, right=True) - first
        turn = torch.arange(max(1, int(count.max()) if len(count) else 1))
        values = torch.cat([self.values.double().cpu(), torch.zeros(1, dtype=torch.float64)])
        at = torch.where(turn < count[:, None], first[:, None] + turn, len(named))
        factor = torch.full((1, 1), self.coefficient, dtype=torch.float64)
        return product_terms(values[at], factor)

    def _inside(
        self, r0: int, r1: int, c0: int, c1: int
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        bounds = torch.tensor([r0, r1], device=self.rows.device)
        first, last = torch.searchsorted(self.rows, bounds).tolist()
        cols = self.cols[first:last]
        inside = (cols >= c0) & (cols < c1)
        at = self.rows[first:last][inside] - r0, cols[inside] - c0
        return at, self.values[first:last][inside]

    def scaled(self, factor: float) -> Sparse:
        """Multiplies the coefficient."""
        return Sparse(self.shape, self.rows, self.cols, self.values, self.coefficient * factor)

    def to(self, device: torch.device) -> None:
        """Moves numbers and values."""
        self.rows, self.cols = self.rows.to(device), self.cols.to(device)
        self.values = self.values.to(device)


def build(given: Loaded) -> Sparse:
    """Make the delta of a ``sparse`` spec.

    Args:
        given: shira_weight (n,), shira_indices (2, n): rows and columns, of any type.

    Raises:
        BadFileError: LT-363, an element outside of the matrix.
    """
    part, (out, inner) = given.part, given.sizes
    rows, cols = given.fields["shira_indices"].long()
    odd = (rows < 0) | (rows >= out) | (cols < 0) | (cols >= inner)
    if bool(odd.any()):
        at = int(odd.nonzero()[0])
        raise BadFileError(
            "LT-363", "an element outside of the matrix", key=part.spec.name,
            expected=f"rows below {out}, columns below {inner}",
            got=f"row {int(rows[at])}, column {int(cols[at])}",
        )  # fmt: skip
    values, coefficient = given.folded(given.fields["shira_weight"])
    shape = (out, inner)
    if part.transposed:
        rows, cols, shape = cols, rows, (inner, out)
    (top, bottom), (left, right) = (
        cut or (0, size)
        for cut, size in zip((part.region.source_rows, part.region.source_cols), shape, strict=True)
    )
    inside = (rows >= top) & (rows < bottom) & (cols >= left) & (cols < right)
    return Sparse((bottom - top, right - left), rows[inside] - top, cols[inside] - left,
                  values[inside].to(given.dtype), coefficient)  # fmt: skip


def pairs_of(fields: Mapping[str, torch.Tensor], spec: DeltaSpec) -> list[Pair]:
    """The matrix and the identity, float64."""
    whole = build(Loaded(fields, DeltaPart(spec, 1.0), 1.0, torch.float64))
    return [thinnest(whole.dense())]
