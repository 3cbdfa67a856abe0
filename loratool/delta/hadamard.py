"""LoHa: the element-wise product of two low-rank matrices (Hyeon-Woo et al., arXiv 2108.06098).

ΔW = scaling · (w1_a w1_b) ⊙ (w2_a w2_b).  With a core t (r, r, k…) a pair is Σ t_ij w_a[i] w_b[j],
and the core goes into the right factor.  The product of two such matrices has a rank of r² at
most, and thin factors of it: every two columns multiplied on the left, every two rows on the right.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from loratool.adapter import DeltaSpec
from loratool.delta.base import Delta, Loaded
from loratool.delta.lowrank import LowRank, Pair, region_of, thin_factors, thinnest
from loratool.linalg.exact import product_terms


class Hadamard(Delta):
    """ΔW = coefficient · (product of the first pair) ⊙ (product of the second).

    Args:
        first: a `LowRank` whose coefficient is 1.
        second: the same, of the same shape.
        coefficient: 1 where it is folded into ``first``.
    """

    def __init__(self, first: LowRank, second: LowRank, coefficient: float = 1.0) -> None:
        self.first = first
        self.second = second
        self.coefficient = coefficient
        self.shape = first.shape
        self.roundings = first.roundings + second.roundings + 1

    def add_to(
        self, acc: torch.Tensor, base: torch.Tensor, r0: int, r1: int, c0: int, c1: int
    ) -> None:
        """Two products of thin matrices, multiplied element by element."""
        block = self._block(self.first, acc, r0, r1, c0, c1)
        block.mul_(self._block(self.second, acc, r0, r1, c0, c1))
        acc.add_(block, alpha=self.coefficient)

    def add_size(
        self, acc: torch.Tensor, base: torch.Tensor, r0: int, r1: int, c0: int, c1: int
    ) -> None:
        """The product of the bounds of both pairs."""
        block, other = torch.zeros_like(acc), torch.zeros_like(acc)
        self.first.add_size(block, base, r0, r1, c0, c1)
        self.second.add_size(other, base, r0, r1, c0, c1)
        acc.add_(block.mul_(other), alpha=abs(self.coefficient))

    def scaled(self, factor: float) -> Hadamard:
        """Multiplies the coefficient."""
        return Hadamard(self.first, self.second, self.coefficient * factor)

    def to(self, device: torch.device) -> None:
        """Moves both pairs."""
        self.first.to(device)
        self.second.to(device)

    def terms(self, rows: torch.Tensor, cols: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """The r² products of four numbers; two of them at a time are exact in float64."""
        rows, cols = rows.to(self.first.left.device), cols.to(self.first.left.device)
        left = _products(self.first.left[rows], self.second.left[rows]).cpu()
        right = _products(self.first.right[:, cols].T, self.second.right[:, cols].T).cpu()
        factor = torch.full((1, 1), self.coefficient, dtype=torch.float64)
        return product_terms(left, right, factor)

    @staticmethod
    def _block(
        pair: LowRank, like: torch.Tensor, r0: int, r1: int, c0: int, c1: int
    ) -> torch.Tensor:
        return pair.left[r0:r1].to(like.dtype) @ pair.right[:, c0:c1].to(like.dtype)


def _products(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Each column of one times each column of the other, (n, r²)."""
    return (one[:, :, None] * other[:, None, :]).flatten(1)


def build(given: Loaded) -> Hadamard:
    """Make the delta of a ``hadamard`` spec.

    Args:
        given: hada_w1_a (out, r), hada_w1_b (r, in…) and the same of w2; with cores hada_t1,
            hada_t2 (r, r, k…) hada_w1_a (r, out) and hada_w1_b (r, in).
    """
    (left, right), other = (_pair(given.fields, number) for number in (1, 2))
    left, coefficient = given.folded(left)
    return Hadamard(region_of(left, right, given), region_of(*other, given), coefficient)


def pairs_of(fields: Mapping[str, torch.Tensor], spec: DeltaSpec) -> list[Pair]:
    """The same change as one product of thin factors, float64, scaling left out.

    Where r² is more than the short side, the matrix itself and the identity are thinner.
    """
    (left, right), (other_left, other_right) = _pair(fields, 1), _pair(fields, 2)
    short = min(left.shape[0], right.shape[1])
    if left.shape[1] * other_left.shape[1] <= short:
        return [(_products(left, other_left), _products(right.T, other_right.T).T)]
    return [thinnest((left @ right) * (other_left @ other_right))]


def _pair(fields: Mapping[str, torch.Tensor], number: int) -> Pair:
    """(out, r) and (r, in·k…) in float64, a core folded into the right one."""
    left, right = fields[f"hada_w{number}_a"], fields[f"hada_w{number}_b"]
    return thin_factors(left, right, fields.get(f"hada_t{number}"))
