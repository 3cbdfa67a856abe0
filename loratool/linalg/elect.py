"""Element-wise combinations of several matrices, after selection.  Pure functions of blocks.

Where values come out of a decomposition, a sum that is zero in real numbers is not zero in
floating point.  ``noise``, a number or (m, 1), says what size of a value means nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

Noise = float | torch.Tensor


def add(values: torch.Tensor, weights: torch.Tensor, **_: Any) -> torch.Tensor:
    """Σ w_t v_t.

    Args:
        values: (T, m, n) float32 or float64, what selection left of each adapter.
        weights: (T,) same dtype, on the CPU: they are numbers to the arithmetic.
    """
    return _weighted(values, weights.tolist())


def elect(
    values: torch.Tensor, weights: torch.Tensor, *, noise: Noise = 0.0, **params: float
) -> torch.Tensor:
    """TIES of the paper: elect γ = sgn Σ w_t v_t, then λ · mean of the w_t v_t of sign γ.

    Where the sum is 0 no sign wins and the result is 0, so that a change of all signs changes
    the sign of the result and nothing else.

    References:
        Yadav et al. 2023, arXiv:2306.01708, algorithm 1.
    """
    scaled = _scaled(values, weights)
    total = _total(scaled)
    if isinstance(noise, torch.Tensor) or noise:
        total.masked_fill_(total.abs() <= noise * float(weights.abs().sum()), 0.0)
    mean = _of_side(scaled, total.sign_())
    return mean.mul_(params.get("lambda", 1.0)).add_(0.0)  # no zero is negative


def elect_peft(
    values: torch.Tensor, weights: torch.Tensor, *, noise: Noise = 0.0, majority: str = "total",
    **_: float,
) -> torch.Tensor:  # fmt: skip
    """TIES of PEFT 0.21.2: signs elected before weighting, 0 counts as +; mean by count.

    By the sum of the values (``majority`` total), or of their signs (frequency).
    """
    sign = _total(values) if majority == "total" else _total([v.sign() for v in values])
    sign.add_(noise * len(values))
    return _of_side(values, _side(sign), gain=weights.tolist())


def elect_mergekit(
    values: torch.Tensor, weights: torch.Tensor, *, noise: Noise = 0.0, **params: float
) -> torch.Tensor:
    """TIES of mergekit: weights first, 0 counts as +; divided by the sum of agreeing weights."""
    scaled = _scaled(values, weights)
    sign = _total(scaled).add_(noise * float(weights.abs().sum()))
    mean = _of_side(scaled, _side(sign), vote=weights.tolist(), least=1e-8)
    return mean.mul_(params.get("lambda", 1.0))


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
    scaled = _scaled(values, weights)
    shares = share.tolist()
    return _of_side(scaled, _side(_total(scaled)), gain=shares, vote=shares)


def _scaled(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    if bool((weights == 1).all()):
        return values
    return values * weights.to(values.device)[:, None, None]


def _total(values: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
    """Σ x_t, one after the other."""
    total = torch.zeros_like(values[0])
    for value in values:
        total.add_(value)
    return total


def _side(sign: torch.Tensor) -> torch.Tensor:
    """±1, + for 0."""
    return torch.copysign(torch.ones((), dtype=sign.dtype, device=sign.device), sign)


def _of_side(
    values: torch.Tensor,
    side: torch.Tensor,
    *,
    gain: Sequence[float] | None = None,
    vote: Sequence[float] | None = None,
    least: float = 0.0,
) -> torch.Tensor:
    """Σ gain_t x_t over Σ vote_t of the x_t of a sign.

    Args:
        values: (T, m, n).
        side: (m, n) of 1, -1, and 0 where no sign counts.
        gain: (T,); None = 1.
        vote: (T,); None = 1.
        least: votes up to this size count as 1.
    """
    own = (values * side).clamp_min_(0)  # sizes of those that agree
    part = _weighted(own, gain)
    own.sign_()
    if vote is None:  # whole numbers: exact in any order
        votes = own.sum(0).clamp_min_(1.0)
    else:
        votes = _weighted(own, vote)
        votes.masked_fill_(votes.abs() <= least, 1.0)
    return torch.addcmul(part.new_zeros(()), part, side).div_(votes)  # 0 + …: no zero is negative


def _weighted(values: torch.Tensor, weights: Sequence[float] | None) -> torch.Tensor:
    """Σ w_t x_t, one after the other."""
    if weights is None:
        return _total(values)
    total = torch.zeros_like(values[0])
    for value, weight in zip(values, weights, strict=True):
        total.add_(value, alpha=weight)
    return total
