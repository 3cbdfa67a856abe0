"""Combinations in the space that the factors span: R×R matrices, never out×in.

For Δ_t = B_t A_t let the columns of U be an orthonormal basis of all columns of all B_t, and the
columns of V one of all rows of all A_t.  Then Δ_t = U M_t Vᵀ without loss, with M_t = Uᵀ B_t A_t V
of at most R×R, R = Σ r_t.  What commutes with a change of orthonormal bases (sums, singular value
decompositions) gives on M_t what it would give on Δ_t; element-wise methods do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from loratool.linalg.dense import DenseCombiner, combine_rows, combine_whole
from loratool.methods import find_method

_NEGLIGIBLE = 1e-13  # of the largest singular value or element: what rounding made
_BLOCK_ELEMENTS = 1 << 18  # of all adapters together, in blocks of rows

Pair = tuple[torch.Tensor, torch.Tensor]


def core_space(pairs: Sequence[Pair]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U (out, p), V (in, q) and M (T, p, q) of B_t A_t = U M_t Vᵀ.

    Args:
        pairs: (lora_B (out, r_t), lora_A (r_t, in)) float64, scalings folded in.

    Notes:
        The bases are singular vectors of the stacked factors, the largest entry of each positive,
        so that they do not depend on the order of the adapters.  Cost O((out + in) R²).

    References:
        Panariello et al. 2025, arXiv:2509.17786.
    """
    ranks = [A.shape[0] for _, A in pairs]
    U, left = _basis(torch.cat([B for B, _ in pairs], 1))
    V, right = _basis(torch.cat([A for _, A in pairs], 0).T)
    cores = [
        one @ other.T
        for one, other in zip(
            torch.split(left, ranks, 1), torch.split(right, ranks, 1), strict=True
        )
    ]
    return U, V, torch.stack(cores)


def _basis(stack: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal columns Q (n, p) that span a stack's columns, and Qᵀ stack (p, R)."""
    Q, R = torch.linalg.qr(stack)
    U, S, Vh = torch.linalg.svd(R, full_matrices=False)
    count = max(1, int((_NEGLIGIBLE * S[:1] < S).sum()))
    del stack
    basis = Q @ U[:, :count]
    top = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    sign = torch.where(top < 0, -1.0, 1.0).to(basis.dtype)
    return basis.mul_(sign), (S[:count, None] * Vh[:count]) * sign.T


def inner(
    cores: torch.Tensor, weights: Sequence[float], *, keys: Sequence[int], rank: int, **params: Any
) -> torch.Tensor:
    """An element-wise method on the cores.

    Zeros and sums that cancel are rounding errors in a core; they count as what they stand for.

    Args:
        cores: (T, p, q).
        weights: of the adapters.
        keys: as in `DenseCombiner`.
        rank: Σ r_t or what the user asks for (not used here).
        params: ``inner`` and those of the method inside.
    """
    noise = _NEGLIGIBLE * float(cores.abs().max())
    return combine_whole(cores, params["inner"], params, weights, keys, noise=noise)


def tsv(
    cores: torch.Tensor, weights: Sequence[float], *, keys: Sequence[int], rank: int, **params: Any
) -> torch.Tensor:
    """TSV-Merge: ⌊rank / T⌋ leading components of each, left and right sides made orthogonal.

    References:
        Gargiulo et al. 2024, arXiv:2412.00081.
    """
    U, S, Vh = torch.linalg.svd(cores, full_matrices=False)
    count = max(1, min(rank // len(cores), S.shape[1]))
    scaled = S[:, :count] * torch.tensor(weights, dtype=S.dtype)[:, None]
    real = (S[:, :count] > _NEGLIGIBLE * S.max()).flatten()
    left = U[:, :, :count].transpose(0, 1).flatten(1)[:, real]  # (p, K)
    right = Vh[:, :count].flatten(0, 1)[real]  # (K, q)
    middle = scaled.flatten()[real]
    made: torch.Tensor = _polar(left) * middle @ _polar(right.T).T
    return made * float(params["alpha"])


def iso_c(
    cores: torch.Tensor, weights: Sequence[float], *, keys: Sequence[int], rank: int, **params: Any
) -> torch.Tensor:
    """Iso-C: the sum with its singular values replaced by their mean over the sum's support.

    References:
        Marczak et al. 2025, arXiv:2502.04959; there the mean is over min(out, in) values, nearly
        all of them zero for low-rank changes.
    """
    U, S, Vh = torch.linalg.svd(_total(cores, weights), full_matrices=False)
    real = _negligible(cores, weights) < S
    if not bool(real.any()):
        return torch.zeros_like(cores[0])
    made: torch.Tensor = U[:, real] @ Vh[real]
    size: torch.Tensor = S[real].mean() * float(params["scaling"])
    return made * size


def iso_cts(
    cores: torch.Tensor, weights: Sequence[float], *, keys: Sequence[int], rank: int, **params: Any
) -> torch.Tensor:
    """Iso-CTS: the least common directions of the sum give way to task-specific ones.

    With p directions in all, k = round(common · p) leading ones of the sum stay; each adapter adds
    ⌊(p - k) / T⌋ leading ones of what it has outside of them; all are made orthogonal and get the
    mean of their singular values.

    References:
        Marczak et al. 2025, arXiv:2502.04959.
    """
    U, S, Vh = torch.linalg.svd(_total(cores, weights), full_matrices=False)
    size = int((_negligible(cores, weights) < S).sum())
    if not size:
        return torch.zeros_like(cores[0])
    common = max(1, round(float(params["common"]) * size))
    each = (size - common) // len(cores)
    left, right, sigma = [U[:, :common]], [Vh[:common].T], [S[:common]]
    for core, weight in zip(cores, weights, strict=True):
        own = weight * core
        own = own - left[0] @ (left[0].T @ own)
        u, s, vh = torch.linalg.svd(own, full_matrices=False)
        keep = int((_negligible(core[None], [weight]) < s[:each]).sum())
        left.append(u[:, :keep])
        right.append(vh[:keep].T)
        sigma.append(s[:keep])
    mean = torch.cat(sigma).mean() * float(params["scaling"])
    return _polar(torch.cat(left, 1)) @ _polar(torch.cat(right, 1)).T * mean


def knots(
    pairs: Sequence[Pair], weights: Sequence[float], *, keys: Sequence[int], **params: Any
) -> Pair:
    """KnOTS: [Δ_1 … Δ_T] = U Σ [V_1 … V_T]ᵀ, TIES on the V_t, back to one pair of factors.

    Args:
        pairs: (lora_B, lora_A) float64, scalings folded in.
        weights: of the adapters.
        keys: as in `DenseCombiner`.
        params: those of ``ties``.

    Returns:
        lora_B = U Σ (out, p) and lora_A = the merged V (p, in).

    Notes:
        TIES is odd, so that the signs of the singular vectors cancel.  Cost O((out + in) R²) per
        pass; the V_t, which would be T R×in matrices, are made a block of rows at a time.

    References:
        Stoica et al. 2024, arXiv:2410.19735.
    """
    Q, left = torch.linalg.qr(torch.cat([B for B, _ in pairs], 1))
    ranks = [A.shape[0] for _, A in pairs]
    right = [torch.linalg.qr(A.T) for _, A in pairs]
    core = torch.cat([L @ R.T for L, (_, R) in zip(left.split(ranks, 1), right, strict=True)], 1)
    U, S, Vh = torch.linalg.svd(core, full_matrices=False)
    count = max(1, int((_NEGLIGIBLE * S[:1] < S).sum()))
    widths = [R.shape[0] for _, R in right]
    parts = list(zip(Vh[:count].split(widths, 1), (basis for basis, _ in right), strict=True))

    def make(r0: int, r1: int) -> torch.Tensor:
        return torch.stack([part[r0:r1] @ basis.T for part, basis in parts])

    cols = pairs[0][1].shape[1]
    # What perturbs ΔW by eps·σ₁ turns the i-th singular vector by eps·σ₁/σ_i
    noise = _NEGLIGIBLE * (S[:1] / S[:count])[:, None] if float(S[0]) else None
    combiner = DenseCombiner(find_method("ties"), params, weights, count * cols, keys)
    height = max(1, _BLOCK_ELEMENTS // (cols * len(pairs)))
    merged = combine_rows(combiner, (count, cols), make, height=height, noise=noise)
    return Q @ (U[:, :count] * S[:count]), merged


def _total(cores: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    return torch.einsum("tpq,t->pq", cores, torch.tensor(weights, dtype=cores.dtype))


def _negligible(cores: torch.Tensor, weights: Sequence[float]) -> float:
    """Singular values of the sum that rounding made: by the size of the terms, which may cancel."""
    norms: list[float] = torch.linalg.matrix_norm(cores).tolist()
    return _NEGLIGIBLE * sum(abs(w) * n for w, n in zip(weights, norms, strict=True))


def _polar(columns: torch.Tensor) -> torch.Tensor:
    """The nearest orthonormal columns; on their span alone where they depend on each other."""
    P, S, Qh = torch.linalg.svd(columns, full_matrices=False)
    real = 1e-9 * S[:1] < S
    nearest: torch.Tensor = P[:, real] @ Qh[real]
    return nearest
