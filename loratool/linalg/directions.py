"""Coefficients of products of thin matrices that follow from their sizes and angles.

Every function takes the products (lora_B (out, r_t), lora_A (r_t, in)), float64, and a weight of
each, and gives the coefficients of a sum.  Cost O((out + in) Σr_t Σr_t): the products are never
formed, since ⟨B₁A₁, B₂A₂⟩ = Σ (B₁ᵀB₂) ∘ (A₁A₂ᵀ).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from loratool.linalg.concat import product_norm

Pair = tuple[torch.Tensor, torch.Tensor]

_STRAIGHT = 1e-6
"""Sine, or length of a mean of unit vectors, below which no arc can be told: the straight line."""

_OPPOSITE = _STRAIGHT**2 / 2 - 1  # the cosine at that sine
_STEPS, _STILL = 200, 1e-13


def slerp(pairs: Sequence[Pair], weights: Sequence[float]) -> list[float]:
    """The point on the arc from one product to another.

    With cos Ω = ⟨Δ₁, Δ₂⟩ / (‖Δ₁‖ ‖Δ₂‖): sin((1-t)Ω)/sin Ω and sin(tΩ)/sin Ω; the straight line,
    1 - t and t, where sin Ω < 1e-6 or one of them is zero.

    Args:
        pairs: two.
        weights: 1 - t and t: t = 0 gives Δ₁, 1 gives Δ₂.

    References:
        Shoemake 1985.
    """
    one, other = pairs
    t = weights[1]
    norms = product_norm(*one) * product_norm(*other)
    if norms == 0:
        return [1 - t, t]
    omega = math.acos(max(-1.0, min(1.0, _inner(one, other) / norms)))
    if math.sin(omega) < _STRAIGHT:
        return [1 - t, t]
    return [math.sin((1 - t) * omega) / math.sin(omega), math.sin(t * omega) / math.sin(omega)]


def karcher(pairs: Sequence[Pair], weights: Sequence[float]) -> list[float]:
    """The mean direction on the sphere, at the mean size.

    u, of length 1, has the least Σ w_t θ(u, Δ_t/‖Δ_t‖)²; the result is Σ w_t ‖Δ_t‖ · u.  Where the
    directions cancel, or one is opposite to their sum, no arc leads there: the straight line.

    Args:
        pairs: any number.
        weights: shares of 1, of which those of zero products give nothing.

    References:
        Karcher 1977; mergekit's ``karcher``, which stops after ten steps.
    """
    norms, cosines = _angles(pairs)
    shares = torch.tensor(weights, dtype=torch.float64) * (norms > 0)
    size = float((shares * norms).sum())
    mean = shares / shares.sum().clamp_min(1e-300)
    length = math.sqrt(max(0.0, float(mean @ cosines @ mean)))
    if length < _STRAIGHT:
        return list(weights)
    at = mean / length  # coefficients of u on the unit vectors, of which it is a sum
    if float((cosines @ at).min()) < _OPPOSITE:
        return list(weights)
    for _ in range(_STEPS):
        near = (cosines @ at).clamp(-1, 1)
        angles = near.acos()
        pull = mean * torch.where(angles > 0, angles / angles.sin().clamp_min(1e-9), 1.0)
        step = pull - at * float(pull @ near)
        far = math.sqrt(max(0.0, float(step @ cosines @ step)))
        if far < _STILL:
            break
        at = math.cos(far) * at + math.sin(far) / far * step
        at /= math.sqrt(float(at @ cosines @ at))
    return [size * c / n if n else 0.0 for c, n in zip(at.tolist(), norms.tolist(), strict=True)]


def model_stock(pairs: Sequence[Pair], weights: Sequence[float]) -> list[float]:
    """T times the mean, t = N cos θ / (1 + (N - 1) cos θ), cos θ the mean over all pairs.

    Products at right angles or beyond share nothing: t = 0 where cos θ is not positive.

    Args:
        pairs: N of them.
        weights: the products count times these.

    References:
        Jang et al. 2024, arXiv:2403.19522, equation 5; the mean over pairs is mergekit's.
    """
    count = len(pairs)
    _, cosines = _angles(pairs)
    signs = torch.tensor(weights, dtype=torch.float64).sign()
    above = torch.triu(cosines * signs[:, None] * signs, diagonal=1)
    cosine = max(0.0, float(above.sum()) / (count * (count - 1) / 2)) if count > 1 else 1.0
    share = count * cosine / (1 + (count - 1) * cosine)
    return [share * w / count for w in weights]


def _angles(pairs: Sequence[Pair]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sizes (N,) and cosines (N, N) of products; those of zero ones are 0."""
    norms = torch.tensor([product_norm(*pair) for pair in pairs], dtype=torch.float64)
    cosines = torch.eye(len(pairs), dtype=torch.float64) * (norms > 0)
    for i, one in enumerate(pairs):
        for j in range(i):
            size = float(norms[i] * norms[j])
            cosines[i, j] = cosines[j, i] = _inner(one, pairs[j]) / size if size else 0.0
    return norms, cosines.clamp(-1, 1)


def _inner(one: Pair, other: Pair) -> float:
    return float(((one[0].T @ other[0]) * (one[1] @ other[1].T)).sum())
