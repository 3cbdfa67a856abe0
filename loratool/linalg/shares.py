"""A budget for singular values of matrices that cost something by being there at all."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from loratool.frozen import Struct
from loratool.linalg.rank import allocate_ranks

Floats = npt.NDArray[np.float64]

_TRIED = 6  # matrices of which every choice is tried
_TOGGLED = 24  # more that are tried one at a time


def allocate_with_shares(
    squares: Sequence[torch.Tensor], costs: Sequence[int], shares: Sequence[int], budget: int
) -> list[int]:
    """`allocate_ranks`, where a matrix that gets any rank costs its share once more.

    Args:
        squares: per matrix σ², descending, >= 0.
        costs: per matrix what one unit of rank costs, > 0.
        shares: per matrix what its first unit costs beyond that, >= 0.
        budget: what may be spent.

    Notes:
        At a price per unit of cost every matrix is worth what it gains at its best rank less what
        that costs.  A choice that goes against the sign of a worth loses that much of Lagrange's
        bound, so that most are settled; all choices among the few others are tried.
    """
    problem = _Problem(squares, costs, shares, budget)
    price = problem.price()
    worth = problem.worth(price)
    kept = frozenset(int(m) for m in np.flatnonzero(worth > 0))
    best, value = problem.solve(kept)
    bound = price * budget + float(worth[worth > 0].sum())
    doubtful = [int(m) for m in np.argsort(abs(worth)) if abs(worth[m]) <= bound - value]
    settled = kept - set(doubtful[:_TRIED])
    for count in range(len(doubtful[:_TRIED]) + 1):
        for chosen in itertools.combinations(doubtful[:_TRIED], count):
            best, value = max((best, value), problem.solve(settled | set(chosen)), key=_gain)
    for one in doubtful[_TRIED : _TRIED + _TOGGLED]:
        there = frozenset(m for m, rank in enumerate(best) if rank)
        best, value = max((best, value), problem.solve(there ^ {one}), key=_gain)
    return best


def _gain(found: tuple[list[int], float]) -> float:
    return found[1]


class _Problem(Struct, dict=True):
    squares: Sequence[torch.Tensor]
    costs: Sequence[int]
    shares: Sequence[int]
    budget: int

    def __post_init__(self) -> None:
        values = [s.detach().cpu().double().numpy() for s in self.squares]
        self.gains = [np.cumsum(v[v > 0]) for v in values]

    def solve(self, kept: frozenset[int]) -> tuple[list[int], float]:
        """The best ranks if these matrices pay their shares, and what they gain."""
        ranks, order = [0] * len(self.squares), sorted(kept)
        left = self.budget - sum(self.shares[m] for m in order)
        if left < 0:
            return ranks, 0.0
        found = allocate_ranks(
            [self.squares[m] for m in order], [self.costs[m] for m in order], left
        )
        for m, rank in zip(order, found, strict=True):
            ranks[m] = rank
        return ranks, sum(float(s[:k].sum()) for s, k in zip(self.squares, ranks, strict=True))

    def price(self) -> float:
        """The least price per unit of cost at which no more than the budget is spent."""
        low, high = 0.0, max([float(s.sum()) for s in self.squares], default=0.0)
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self._spent(middle) > self.budget else (low, middle)
        return high

    def worth(self, price: float) -> Floats:
        """What each matrix gains at its best rank of one or more, less what that costs."""
        found = [self._nets(m, price).max(initial=-np.inf) for m in range(len(self.squares))]
        return np.array(found, dtype=np.float64)

    def _nets(self, m: int, price: float) -> Floats:
        gains = self.gains[m]
        spent = self.shares[m] + self.costs[m] * np.arange(1, len(gains) + 1)
        return np.asarray(gains - price * spent, dtype=np.float64)

    def _spent(self, price: float) -> int:
        total = 0
        for m, (cost, share) in enumerate(zip(self.costs, self.shares, strict=True)):
            nets = self._nets(m, price)
            if len(nets) and nets.max() > 0:
                total += share + cost * (1 + int(nets.argmax()))
        return total
