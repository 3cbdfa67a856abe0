"""Best low-rank approximations of dense matrices."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from loratool.frozen import Frozen

_GRAM_ROWS = 4096  # rows added to a Gram matrix at a time: bounds the float64 copy


class LowRankFit(Frozen):
    """The best rank-k approximation of a matrix, balanced as lora_B @ lora_A.

    Attributes:
        lora_B: (m, k) float64.
        lora_A: (k, n) float64.
        singular_values: (k,) float64, descending.
        norm: ‖D‖_F of the matrix.
        captured: Σσ² kept / ‖D‖_F², in [0, 1]; 1 for a zero matrix.
    """

    lora_B: torch.Tensor
    lora_A: torch.Tensor
    singular_values: torch.Tensor
    norm: float
    captured: float


def best_rank(matrix: torch.Tensor, rank: int) -> LowRankFit:
    """Truncated singular value decomposition by the float64 Gram matrix of the short side.

    With V the leading eigenvectors of DᵀD, D V Vᵀ is the best rank-k approximation
    (Eckart & Young 1936).  The factors hold D V itself, so that at full rank lora_B @ lora_A
    returns D to rounding, however small the trailing singular values are.

    Args:
        matrix: (m, n) float32 or float64, any device.
        rank: k >= 1; cut to min(m, n).

    Returns:
        A `LowRankFit` with √σ on both factors; directions with σ = 0 are zero rows and columns.

    Notes:
        Cost O(m n s + s³) with s = min(m, n); memory 4 s² float64.  Singular values are the
        norms of D V's columns, not roots of eigenvalues.  The Gram matrix's noise eps·σ₁² leaves
        out eps·σ₁²/σ of the matrix where σ is the smallest value kept: nothing for float32 data.
    """
    if matrix.shape[0] < matrix.shape[1]:
        fit = best_rank(matrix.T, rank)
        return LowRankFit(fit.lora_A.T, fit.lora_B.T, fit.singular_values, fit.norm, fit.captured)
    rank = min(rank, matrix.shape[1])
    gram = torch.zeros(matrix.shape[1], matrix.shape[1], dtype=torch.float64, device=matrix.device)
    for block in _row_blocks(matrix):
        wide = block.double()
        gram.addmm_(wide.T, wide)
    energy = float(gram.diagonal().sum())
    vectors = torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :rank]  # (n, k), descending
    del gram
    image = torch.cat([block.double() @ vectors for block in _row_blocks(matrix)])  # (m, k)
    sigma = torch.linalg.vector_norm(image, dim=0)
    root = sigma.sqrt()
    inverse = torch.where(root > 0, 1 / root, torch.zeros_like(root))
    captured = 1.0 if energy == 0 else min(1.0, float(sigma.square().sum()) / energy)
    return LowRankFit(image * inverse, root[:, None] * vectors.T, sigma, energy**0.5, captured)


def whole(matrix: torch.Tensor) -> LowRankFit:
    """A matrix as a product that returns it bit for bit: itself times the identity.

    For ranks that no truncation needs.  A power of two moves half of the size to the identity,
    exactly; in the product each element meets one nonzero term, so any order of summation gives
    it back.

    Args:
        matrix: (m, n) float32.

    Returns:
        Factors of rank min(m, n); no singular values, all energy captured.
    """
    if matrix.shape[0] < matrix.shape[1]:
        fit = whole(matrix.T)
        return LowRankFit(fit.lora_A.T, fit.lora_B.T, fit.singular_values, fit.norm, 1.0)
    wide = matrix.double()
    norm, cols = float(torch.linalg.vector_norm(wide)), matrix.shape[1]
    share = 2.0 ** round(math.log2(norm / math.sqrt(cols)) / 2) if norm > 0 else 1.0
    identity = share * torch.eye(cols, dtype=torch.float64, device=matrix.device)
    return LowRankFit(wide / share, identity, wide.new_empty(0), norm, 1.0)


def _row_blocks(matrix: torch.Tensor) -> Iterator[torch.Tensor]:
    for row in range(0, matrix.shape[0], _GRAM_ROWS):
        yield matrix[row : row + _GRAM_ROWS]


def top_part(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The leading ``rank`` singular components: (U S (m, k), Vh (k, n)), float64.

    Args:
        matrix: (m, n) float32 or float64.
        rank: k >= 1.
    """
    fit = best_rank(matrix, rank)
    root = fit.singular_values.sqrt()
    inverse = torch.where(root > 0, 1 / root, torch.zeros_like(root))
    return fit.lora_B * root, inverse[:, None] * fit.lora_A


def bottom_part(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The trailing ``rank`` of the min(m, n) singular components: (U S, Vh), float64."""
    short = min(matrix.shape)
    left, right = top_part(matrix, short)
    return left[:, short - rank :], right[short - rank :]


def leading_qr(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(Q[:, :rank], R[:rank]) of the QR decomposition in float64."""
    Q, R = torch.linalg.qr(matrix.double())
    return Q[:, :rank], R[:rank]
