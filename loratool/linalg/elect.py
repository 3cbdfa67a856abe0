"""Element-wise combinations of several matrices, after selection.  Pure functions of blocks.

Where values come out of a decomposition, a sum that is zero in real numbers is not zero in
floating point.  ``noise``, a number or (m, 1), says what size of a value means nothing.
"""

from __future__ import annotations

from typing import Any

import torch

Noise = float | torch.Tensor


def add(values: torch.Tensor, weights: torch.Tensor, **_: Any) -> torch.Tensor:
    """Σ w_t v_t.

    Args:
        values: (T, m, n) float32 or float64, what selection left of each adapter.
        weights: (T,) same dtype and device.
    """
    return torch.einsum("tmn,t->mn", values, weights)


def elect(
    values: torch.Tensor, weights: torch.Tensor, *, noise: Noise = 0.0, **params: float
) -> torch.Tensor:
    """TIES of the paper: elect γ = sgn Σ w_t v_t, then λ · mean of the w_t v_t of sign γ.

    Where the sum is 0 no sign wins and the result is 0, so that a change of all signs changes
    the sign of the result and nothing else.

    References:
        Yadav et al. 2023, arXiv:2306.01708, algorithm 1.
    """
    weighted = values * weights[:, None, None]
    total = weighted.sum(0)
    sign = total.sign() * (total.abs() > noise * weights.abs().sum())
    agrees = weighted.sign() == sign  # zeros, where no sign wins
    mean = (weighted * agrees).sum(0) / agrees.sum(0).clamp_min(1)
    return mean * params.get("lambda", 1.0)


def elect_peft(
    values: torch.Tensor, weights: torch.Tensor, *, noise: Noise = 0.0, **_: float
) -> torch.Tensor:
    """TIES of PEFT 0.21.2: signs elected before weighting, 0 counts as +; mean by count."""
    sign = torch.where(values.sum(0) >= -noise * len(values), 1.0, -1.0)
    agrees = values.sign() == sign
    weighted = values * weights[:, None, None]
    return (weighted * agrees).sum(0) / agrees.sum(0).clamp_min(1)


def elect_mergekit(
    values: torch.Tensor, weights: torch.Tensor, *, noise: Noise = 0.0, **params: float
) -> torch.Tensor:
    """TIES of mergekit: weights first, 0 counts as +; divided by the sum of agreeing weights."""
    weighted = values * weights[:, None, None]
    sign = torch.where(weighted.sum(0) >= -noise * weights.abs().sum(), 1.0, -1.0)
    agrees = weighted.sign() == sign
    divisor = (agrees * weights[:, None, None]).sum(0)
    divisor = torch.where(divisor.abs() < 1e-8, 1.0, divisor)
    return (weighted * agrees).sum(0) / divisor * params.get("lambda", 1.0)


def elect_sce(
    values: torch.Tensor, weights: torch.Tensor, *, energies: torch.Tensor, **_: Any
) -> torch.Tensor:
    """SCE: weights proportional to the energy of each adapter, minority signs erased.

    Args:
        values: (T, m, n) of the positions kept.
        weights: (T,) of the user; they scale the adapters before anything else.
        energies: (T,) Σ (w_t v_t)² over the whole matrix.

    References:
        Wan et al. 2024, arXiv:2408.07990.
    """
    weighted = values * weights[:, None, None]
    total = energies.sum()
    share = energies / total if float(total) > 0 else torch.full_like(energies, 1 / len(energies))
    sign = torch.where(weighted.sum(0) >= 0, 1.0, -1.0)
    kept = (weighted.sign() == sign) * share[:, None, None].to(values.dtype)
    whole = kept.sum(0)
    return (weighted * kept).sum(0) / torch.where(whole > 0, whole, 1.0)
