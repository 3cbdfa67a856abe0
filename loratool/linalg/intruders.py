"""Intruder dimensions: leading directions of W + ΔW that W does not have.

Shuttleworth et al. 2024, arXiv 2410.21228; the definition and its defaults are those of PEFT's
``intruders.py`` (0.21.2): left singular vectors, reduced decomposition.
"""

from __future__ import annotations

import torch

from loratool.frozen import Frozen
from loratool.linalg.krylov import largest_overlaps, leading_components

TOP_K = 10  # leading directions looked at
EPSILON = 0.5  # a direction is an intruder below this cosine

_LARGE = 768  # shorter side from which a decomposition costs more than the bounds
_NOTHING = 1e-7  # of the largest singular value: what a Gram matrix in float64 cannot resolve


class Intruders(Frozen):
    """The leading directions of one W + ΔW.

    Attributes:
        cosine: (k,) float64, max_j |u_i(W + ΔW) · u_j(W)|, by descending singular value; for
            intruders in large matrices an upper bound, below the limit all the same.
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

    def cpu(self) -> Intruders:
        """The same on the CPU."""
        tensors = (self.U.cpu(), self.S.cpu(), self.Vh.cpu())
        return Intruders(self.cosine.cpu(), self.index, *tensors)


def find_intruders(weight: torch.Tensor, delta: torch.Tensor) -> Intruders:
    """Compare the leading left singular vectors of W + ΔW with all of W's.

    Args:
        weight: (m, n) float64, any device.
        delta: (m, n) float64, same device.

    Notes:
        Small matrices are decomposed.  Of large ones the leading vectors of W + ΔW are computed,
        and W is asked by matrix products alone how much of each can lie along one of its singular
        vectors: bounds that decide, see `largest_overlaps`.  Where they cannot (values too close
        to each other) the Gram matrix is decomposed.  About 4 m n float64 of memory.
    """
    k = min(TOP_K, *weight.shape)
    if min(weight.shape) < _LARGE:
        before = torch.linalg.svd(weight, full_matrices=False).U
        U, S, Vh = torch.linalg.svd(weight + delta, full_matrices=False)
        found, cosine = (U[:, :k], S[:k], Vh[:k]), (U[:, :k].T @ before).abs().amax(dim=1)
    else:
        changed = weight + delta
        found = leading_components(changed, k) or _decompose(changed, k)
        overlaps = largest_overlaps(weight, found[0], EPSILON)
        if overlaps is None:
            before = _decompose(weight, min(weight.shape))[0]
            cosine = (found[0].T @ before).abs().amax(dim=1)
        else:
            cosine = overlaps.cosine
    index = tuple(torch.nonzero(cosine < EPSILON).flatten().tolist())
    return Intruders(cosine, index, *found)


def _decompose(matrix: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Leading singular triplets by the Gram matrix of the shorter side."""
    if matrix.shape[0] > matrix.shape[1]:
        V, S, Uh = _decompose(matrix.T, count)
        return Uh.T, S, V.T
    U = torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -count:].flip(1)
    image = matrix.T @ U
    S = torch.linalg.vector_norm(image, dim=0)
    return U, S, (image / torch.where(_NOTHING * S[0] < S, S, torch.inf)).T


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
