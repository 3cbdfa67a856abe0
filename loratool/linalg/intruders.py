"""Intruder dimensions: leading directions of W + ΔW that W does not have.

Shuttleworth et al. 2024, arXiv 2410.21228; the definition and its defaults are those of PEFT's
``intruders.py`` (0.21.2): left singular vectors, reduced decomposition.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

TOP_K = 10  # leading directions looked at
EPSILON = 0.5  # a direction is an intruder below this cosine
LAMBDA = 0.75  # what an intruder's singular value is multiplied with


@dataclass(frozen=True)
class Intruders:
    """The leading directions of one W + ΔW.

    Attributes:
        cosine: (k,) float64, max_j |u_i(W + ΔW) · u_j(W)|, by descending singular value.
        index: which of them are intruders.
        U: (m, k), their left singular vectors.
        S: (k,) singular values.
        Vh: (k, n) right singular vectors.
    """

    cosine: torch.Tensor
    index: tuple[int, ...]
    U: torch.Tensor
    S: torch.Tensor
    Vh: torch.Tensor


def find_intruders(
    weight: torch.Tensor,
    delta: torch.Tensor,
    *,
    top_k: int = TOP_K,
    epsilon: float = EPSILON,
) -> Intruders:
    """Compare the leading left singular vectors of W + ΔW with all of W's.

    Args:
        weight: (m, n) float64.
        delta: (m, n) float64.
        top_k: leading directions looked at.
        epsilon: largest cosine of an intruder.

    Notes:
        Two dense decompositions: O(m n min(m, n)) time, about 6 m n float64 of memory.
    """
    before = torch.linalg.svd(weight, full_matrices=False).U
    U, S, Vh = torch.linalg.svd(weight + delta, full_matrices=False)
    k = min(top_k, len(S))
    cosine = (U[:, :k].T @ before).abs().amax(dim=1)
    index = tuple(torch.nonzero(cosine < epsilon).flatten().tolist())
    return Intruders(cosine, index, U[:, :k], S[:k], Vh[:k])


def weakened(
    left: torch.Tensor, right: torch.Tensor, found: Intruders, factor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """ΔW + (λ − 1) Σ σ_i u_i v_iᵀ over the intruders, as factors of rank r + their number.

    Args:
        left: (m, r) and
        right: (r, n), whose product is ΔW.
        found: of W + ΔW.
        factor: λ: 1 leaves them, 0 takes them out of W + ΔW.
    """
    index = list(found.index)
    U = found.U[:, index] * (found.S[index] * (factor - 1))
    return torch.cat([left, U], dim=1), torch.cat([right, found.Vh[index]], dim=0)
