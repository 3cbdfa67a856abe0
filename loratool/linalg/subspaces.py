"""How alike two low-rank matrices are, from their factors: ΔW is never formed."""

from __future__ import annotations

from functools import cached_property

import torch

from loratool.frozen import Frozen
from loratool.linalg.concat import concat_factors, product_norm
from loratool.linalg.product import product_svd


class Spectral(Frozen, dict=True):
    """U diag(S) Vh of one matrix, without the directions that are rounding noise.

    Attributes:
        U: (out, k) float64, orthonormal columns: the B side.
        S: (k,) descending, > 0.
        V: (in, k) float64, orthonormal columns: the A side.
    """

    U: torch.Tensor
    S: torch.Tensor
    V: torch.Tensor

    @cached_property
    def square(self) -> float:
        """‖ΔW‖_F²."""
        return float(self.S.square().sum())


def spectral(lora_B: torch.Tensor, lora_A: torch.Tensor) -> Spectral:
    """Decompose lora_B @ lora_A; keeps S > S[0] · 2⁻⁵² · max(out, in).

    Args:
        lora_B: (out, r) float64, scaling folded in.
        lora_A: (r, in) float64.
    """
    U, S, Vh = product_svd(lora_B, lora_A)
    floor = float(S[0]) * 2.0**-52 * max(U.shape[0], Vh.shape[1]) if len(S) else 0.0
    k = int((floor < S).sum())
    return Spectral(U[:, :k], S[:k], Vh[:k].T)


def inner_product(one: Spectral, two: Spectral) -> float:
    """⟨ΔW₁, ΔW₂⟩ = Σ_ij σ_i τ_j (u_i·x_j)(v_i·y_j)."""
    return float((one.S[:, None] * two.S * (one.U.T @ two.U) * (one.V.T @ two.V)).sum())


def subspace_similarity(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    """φ(i, j) = ‖U₁[:i]ᵀ U₂[:j]‖_F² / min(i, j) for every i and j.

    Args:
        one: (n, k) orthonormal columns, the leading directions first.
        two: (n, l) the same of the other matrix.

    Returns:
        (k, l) in [0, 1]; 1 where the smaller subspace lies in the larger one.

    References:
        Hu et al. 2021, arXiv 2106.09685, eq. 4 (sec. 7.2).
    """
    squares = (one.T @ two).square()
    sums = squares.cumsum(0).cumsum(1)
    i = torch.arange(1, squares.shape[0] + 1, dtype=sums.dtype)[:, None]
    j = torch.arange(1, squares.shape[1] + 1, dtype=sums.dtype)
    return sums / torch.minimum(i, j)


def principal_angles(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    """Angles between the spans of two orthonormal sets, ascending, in radians.

    Small angles from the sine, large ones from the cosine, so that both keep full accuracy.

    References:
        Björck & Golub 1973, Math. Comp. 27, sec. 3.
    """
    if one.shape[1] < two.shape[1]:
        one, two = two, one
    inner = one.T @ two
    cosine = torch.linalg.svdvals(inner).clamp(max=1)  # descending
    sine = torch.linalg.svdvals(two - one @ inner).flip(0).clamp(max=1)  # ascending
    return torch.where(cosine > 0.7, torch.asin(sine), torch.acos(cosine))


def difference_norm(
    one: tuple[torch.Tensor, torch.Tensor], two: tuple[torch.Tensor, torch.Tensor]
) -> float:
    """‖B₁A₁ − B₂A₂‖_F, accurate also where the two are equal up to the last bit."""
    if all(torch.equal(a, b) for a, b in zip(one, two, strict=True)):
        return 0.0
    return product_norm(*concat_factors([(*one, 1.0), (*two, -1.0)]))
