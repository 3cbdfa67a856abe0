"""Singular value decompositions and norms of lora_B @ lora_A that never form the product."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ProductSVD:
    """U diag(S) Vh = lora_B @ lora_A.

    Attributes:
        U: (out, k) with orthonormal columns, k = min(r, out, in).
        S: (k,) descending.
        Vh: (k, in) with orthonormal rows.
    """

    U: torch.Tensor
    S: torch.Tensor
    Vh: torch.Tensor

    @property
    def rank(self) -> int:
        """Singular values above rounding: S > S[0] · eps · max(out, in)."""
        if not len(self.S):
            return 0
        eps = torch.finfo(self.S.dtype).eps
        floor = self.S[0] * eps * max(self.U.shape[0], self.Vh.shape[1])
        return int((self.S > floor).sum())


def svd_of_factors(lora_B: torch.Tensor, lora_A: torch.Tensor) -> ProductSVD:
    """Decompose a product of two thin matrices.

    Args:
        lora_B: (out, r) float32 or float64.
        lora_A: (r, in) same dtype and device.

    Notes:
        QR of both factors, then the SVD of an r × r matrix.  Cost O((out + in) r²).
        Absolute error of a singular value: a few eps · ‖lora_B‖ · ‖lora_A‖.

    References:
        Golub & Van Loan 2013, sec. 5.4.
    """
    Q_B, R_B = torch.linalg.qr(lora_B)
    Q_A, R_A = torch.linalg.qr(lora_A.T)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    return ProductSVD(Q_B @ U, S, Vh @ Q_A.T)


def product_norm(lora_B: torch.Tensor, lora_A: torch.Tensor) -> float:
    """‖lora_B @ lora_A‖_F from the triangular factors: no cancellation as in a trace of Grams."""
    R_B = torch.linalg.qr(lora_B, mode="r").R
    R_A = torch.linalg.qr(lora_A.T, mode="r").R
    return float(torch.linalg.matrix_norm(R_B @ R_A.T))


def split_factors(found: ProductSVD, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best rank-k approximation with √S on both sides (Eckart & Young 1936).

    Args:
        found: a decomposition.
        rank: k >= 1; more than there is gives zero columns and rows.

    Returns:
        lora_B (out, k), lora_A (k, in).
    """
    kept = min(rank, len(found.S))
    root = found.S[:kept].sqrt()
    lora_B = found.U.new_zeros(found.U.shape[0], rank)
    lora_A = found.Vh.new_zeros(rank, found.Vh.shape[1])
    lora_B[:, :kept] = found.U[:, :kept] * root
    lora_A[:kept] = root[:, None] * found.Vh[:kept]
    return lora_B, lora_A
