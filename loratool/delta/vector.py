"""Changes without factors: bias deltas, replaced rows, whole new tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from loratool.delta.base import Delta
from loratool.plan import DeltaPart


class Vector(Delta):
    """A row vector added to a (1, n) view.

    Args:
        values: (n,) float32 or float64, every coefficient folded in.
    """

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values
        self.shape = (1, values.shape[0])

    def add_to(
        self, acc: torch.Tensor, base: torch.Tensor, r0: int, r1: int, c0: int, c1: int
    ) -> None:
        """Plain addition."""
        acc.add_(self.values[None, c0:c1].to(acc.dtype))

    def scaled(self, factor: float) -> Vector:
        """Multiplies the values."""
        return Vector(self.values * factor)


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

    def scaled(self, factor: float) -> Rows:
        """Multiplies the weight."""
        return Rows(self.shape, self.index, self.values, self.weight * factor, self.exact)


def build(
    fields: Mapping[str, torch.Tensor],
    part: DeltaPart,
    *,
    coefficient: float,
    dtype: torch.dtype,
) -> Vector:
    """Make the delta of a ``vector`` spec.

    Args:
        fields: delta (n,) as stored.
        part: the spec with its region.
        coefficient: weight · scaling.
        dtype: type of the accumulator.
    """
    values = fields["delta"].double().flatten()
    source = part.region.source_cols or part.region.source_rows
    if source is not None:
        values = values[source[0] : source[1]]
    return Vector((values * coefficient).to(dtype))
