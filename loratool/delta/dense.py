"""A change that is stored whole: LyCORIS' ``full``, ComfyUI's ``diff``."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from loratool.adapter import DeltaSpec
from loratool.delta.base import Delta, Loaded
from loratool.delta.lowrank import Pair, thinnest
from loratool.linalg.exact import product_terms
from loratool.plan import DeltaPart


class Dense(Delta):
    """ΔW = coefficient · values.

    Args:
        values: (rows, cols) in any float type; widened block by block.
        coefficient: of all of them.
    """

    roundings = 3

    def __init__(self, values: torch.Tensor, coefficient: float = 1.0) -> None:
        self.values = values
        self.coefficient = coefficient
        self.shape = (values.shape[0], values.shape[1])

    def add_to(
        self, acc: torch.Tensor, base: torch.Tensor, r0: int, r1: int, c0: int, c1: int
    ) -> None:
        """Plain addition."""
        acc.add_(self.values[r0:r1, c0:c1].to(acc.dtype), alpha=self.coefficient)

    def add_size(
        self, acc: torch.Tensor, base: torch.Tensor, r0: int, r1: int, c0: int, c1: int
    ) -> None:
        """|coefficient · value|."""
        block = self.values[r0:r1, c0:c1].to(acc.dtype)
        acc.add_(block.abs(), alpha=abs(self.coefficient))

    def terms(self, rows: torch.Tensor, cols: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """One product."""
        device = self.values.device
        column = self.values[rows.to(device), cols.to(device)].double().cpu()[:, None]
        return product_terms(column, torch.full((1, 1), self.coefficient, dtype=torch.float64))

    def scaled(self, factor: float) -> Dense:
        """Multiplies the coefficient."""
        return Dense(self.values, self.coefficient * factor)

    def to(self, device: torch.device) -> None:
        """Moves the values."""
        self.values = self.values.to(device)


def build(given: Loaded) -> Dense:
    """Make the delta of a ``full`` spec.

    Args:
        given: full_delta (out, in, k…) as stored.
    """
    values = given.fields["full_delta"].flatten(1)  # the coefficient is rounded once, in a product
    turned = values.T if given.part.transposed else values
    return Dense(cut(turned, given.part), given.coefficient)


def cut(values: torch.Tensor, part: DeltaPart) -> torch.Tensor:
    """The rows and columns of a matrix that a part takes."""
    rows, cols = part.region.source_rows, part.region.source_cols
    values = values if rows is None else values[rows[0] : rows[1]]
    return values if cols is None else values[:, cols[0] : cols[1]]


def pairs_of(fields: Mapping[str, torch.Tensor], spec: DeltaSpec) -> list[Pair]:
    """The matrix and the identity, float64."""
    return [thinnest(fields["full_delta"].double().flatten(1))]
