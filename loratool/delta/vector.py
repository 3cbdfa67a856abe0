"""Changes without factors: bias deltas, replaced rows, whole new tensors."""

from __future__ import annotations

import torch

from loratool.delta.base import Delta, Loaded
from loratool.linalg.exact import product_terms


class Vector(Delta):
    """A row vector, times a coefficient, added to a (1, n) view.

    Args:
        values: (n,) float32 or float64.
        coefficient: 1 where it is folded into ``values``.
    """

    roundings = 3

    def __init__(self, values: torch.Tensor, coefficient: float = 1.0) -> None:
        self.values = values
        self.coefficient = coefficient
        self.shape = (1, values.shape[0])

    def add_to(
        self, acc: torch.Tensor, base: torch.Tensor, r0: int, r1: int, c0: int, c1: int
    ) -> None:
        """Plain addition."""
        acc.add_(self.values[None, c0:c1].to(acc.dtype), alpha=self.coefficient)

    def add_size(
        self, acc: torch.Tensor, base: torch.Tensor, r0: int, r1: int, c0: int, c1: int
    ) -> None:
        """|coefficient · value|."""
        acc.add_(self.values[None, c0:c1].abs(), alpha=abs(self.coefficient))

    def terms(self, rows: torch.Tensor, cols: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """One product, coefficient · value."""
        values = self.values[cols.to(self.values.device)].cpu()
        factor = torch.full((1, 1), self.coefficient, dtype=torch.float64)
        return product_terms(values[:, None], factor)

    def scaled(self, factor: float) -> Vector:
        """Multiplies the coefficient."""
        return Vector(self.values, self.coefficient * factor)

    def to(self, device: torch.device) -> None:
        """Moves the values."""
        self.values = self.values.to(device)


class Rows(Delta):
    """Chosen rows become new ones: W[i] + weight·(new - W[i]) (trainable tokens).

    Args:
        shape: of the whole matrix.
        index: (k,) int64 row numbers, each at most once.
        values: (k, cols) float32 or float64.
        weight: the user's coefficient.
        exact: put the new rows in as they are.  Right for weight 1 when nothing else replaces
            the tensor, and when this delta acts before any other.
    """

    is_additive = False
    roundings = 3

    def __init__(
        self,
        shape: tuple[int, int],
        index: torch.Tensor,
        values: torch.Tensor,
        weight: float = 1.0,
        exact: bool = False,
    ) -> None:
        self.shape = shape
        self.index = index
        self.values = values
        self.weight = weight
        self.exact = exact and weight == 1

    def add_to(
        self, acc: torch.Tensor, base: torch.Tensor, r0: int, r1: int, c0: int, c1: int
    ) -> None:
        """Touches only the rows inside the block."""
        inside = torch.nonzero((self.index >= r0) & (self.index < r1)).flatten()
        if not len(inside):
            return
        rows = self.index[inside] - r0
        new = self.values[inside, c0:c1].to(acc.dtype)
        if self.exact:
            acc[rows] = new
        else:
            acc[rows] += (new - base[rows]) * self.weight

    def add_size(
        self, acc: torch.Tensor, base: torch.Tensor, r0: int, r1: int, c0: int, c1: int
    ) -> None:
        """|weight| · (|new| + |W|) in the rows inside the block."""
        inside = torch.nonzero((self.index >= r0) & (self.index < r1)).flatten()
        rows = self.index[inside] - r0
        new = self.values[inside, c0:c1].to(acc.dtype)
        acc[rows] += (new.abs() + base[rows].abs()) * abs(self.weight)

    def terms(self, rows: torch.Tensor, cols: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """Two products, weight · new - weight · W; zeros in other rows."""
        index, values = self.index.cpu(), self.values.double().cpu()
        position = torch.full((self.shape[0],), -1, dtype=torch.int64)
        position[index] = torch.arange(len(index))
        found = position[rows]
        pair = torch.stack([values[found.clamp_min(0), cols], -base], dim=1)
        pair[found < 0] = 0
        return product_terms(pair, torch.full((1, 1), self.weight, dtype=torch.float64))

    def scaled(self, factor: float) -> Rows:
        """Multiplies the weight."""
        return Rows(self.shape, self.index, self.values, self.weight * factor, self.exact)

    def to(self, device: torch.device) -> None:
        """Moves row numbers and values."""
        self.index, self.values = self.index.to(device), self.values.to(device)


def build(given: Loaded) -> Vector:
    """Make the delta of a ``vector`` spec.

    Args:
        given: delta (n,) as stored.
    """
    values, region = given.fields["delta"].flatten(), given.part.region
    source = region.source_cols or region.source_rows
    if source is not None:
        values = values[source[0] : source[1]]
    values, coefficient = given.folded(values)
    return Vector(values.to(given.dtype), coefficient)
