"""Element-wise combinations of several matrices, after selection.  Pure functions of blocks.

Where values come out of a decomposition, a sum that is zero in real numbers is not zero in
floating point.  ``noise``, a number or (m, 1), says what size of a value means nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

Noise = float | torch.Tensor


def add(values: torch.Tensor, weights: torch.Tensor, **_: Any) -> torch.Tensor:
    """Σ w_t v_t.

    Args:
        values: (T, m, n) float32 or float64, what selection left of each adapter.
        weights: (T,) same dtype, on the CPU: they are numbers to the arithmetic.
    """
    total = torch.zeros_like(values[0])
    for value, weight in zip(values, weights.tolist(), strict=True):
        total.add_(value, alpha=weight)
    return total


def elect(
    values: torch.Tensor, weights: torch.Tensor, *, noise: Noise = 0.0, **params: float
) -> torch.Tensor:
    """TIES of the paper: elect γ = sgn Σ w_t v_t, then λ · mean of the w_t v_t of sign γ.

    Where the sum is 0 no sign wins and the result is 0, so that a change of all signs changes
    the sign of the result and nothing else.

    References:
        Yadav et al. 2023, arXiv:2306.01708, algorithm 1.
    """
    found = _sides(values, weights.tolist(), 1.0, 1.0)
    mean = found.of_sign(found.total, least=1.0)
    is_zero = found.total.abs() <= noise * float(weights.abs().sum())
    return mean.mul_(params.get("lambda", 1.0)).masked_fill_(is_zero, 0.0)


def elect_peft(
    values: torch.Tensor, weights: torch.Tensor, *, noise: Noise = 0.0, **_: float
) -> torch.Tensor:
    """TIES of PEFT 0.21.2: signs elected before weighting, 0 counts as +; mean by count."""
    found = _sides(values, 1.0, weights.tolist(), 1.0)
    return found.of_sign(found.total + noise * len(values), least=1.0)


def elect_mergekit(
    values: torch.Tensor, weights: torch.Tensor, *, noise: Noise = 0.0, **params: float
) -> torch.Tensor:
    """TIES of mergekit: weights first, 0 counts as +; divided by the sum of agreeing weights."""
    found = _sides(values, weights.tolist(), 1.0, weights.tolist())
    sign = found.total + noise * float(weights.abs().sum())
    return found.of_sign(sign, least=1e-8).mul_(params.get("lambda", 1.0))


def elect_sce(
    values: torch.Tensor, weights: torch.Tensor, *, energies: torch.Tensor, **_: Any
) -> torch.Tensor:
    """SCE: weights proportional to the energy of each adapter, minority signs erased.

    Args:
        values: (T, m, n) of the positions kept.
        weights: (T,) of the user; they scale the adapters before anything else.
        energies: (T,) Σ (w_t v_t)² over the whole matrix, on the CPU.

    References:
        Wan et al. 2024, arXiv:2408.07990.
    """
    total = energies.sum()
    share = energies / total if float(total) > 0 else torch.full_like(energies, 1 / len(energies))
    found = _sides(values, weights.tolist(), share.tolist(), share.tolist())
    return found.of_sign(found.total, least=0.0)


@dataclass(frozen=True)
class _Sides:
    """Sums over the adapters, (m, n) each, of what is positive and of what is negative.

    Attributes:
        total: Σ x_t.
        positive: Σ gain_t x_t over x_t > 0, and
        negative: over x_t < 0.
        votes_positive: Σ vote_t over x_t > 0, and
        votes_negative: over x_t < 0.
    """

    total: torch.Tensor
    positive: torch.Tensor
    negative: torch.Tensor
    votes_positive: torch.Tensor
    votes_negative: torch.Tensor

    def of_sign(self, sign: torch.Tensor, *, least: float) -> torch.Tensor:
        """Sum over votes on the side of the sign, + for 0; votes up to ``least`` count as 1."""
        wins = sign >= 0
        votes = torch.where(wins, self.votes_positive, self.votes_negative)
        votes = votes.masked_fill_(votes.abs() <= least, 1.0)
        return torch.where(wins, self.positive, self.negative).div_(votes)


def _sides(
    values: torch.Tensor,
    scale: Sequence[float] | float,
    gain: Sequence[float] | float,
    vote: Sequence[float] | float,
) -> _Sides:
    """Sums by sign of x_t = scale_t v_t, one adapter at a time: blocks stay in the cache."""
    found = _Sides(*(torch.zeros_like(values[0]) for _ in range(5)))
    for t, value in enumerate(values):
        s, g, v = (f if isinstance(f, float) else f[t] for f in (scale, gain, vote))
        x = value if s == 1 else value * s
        found.total.add_(x)
        up, down = x.clamp_min(0), x.clamp_max(0)
        found.positive.add_(up, alpha=g)
        found.negative.add_(down, alpha=g)
        found.votes_positive.add_(up.sign_(), alpha=v)
        found.votes_negative.sub_(down.sign_(), alpha=v)
    return found
