"""Singular value decomposition of a product of two thin matrices, without forming it."""

from __future__ import annotations

import torch

from loratool.frozen import Frozen


class ProductSVD(Frozen):
    """lora_B @ lora_A = U diag(S) Vh, its singular vectors made when asked for.

    Attributes:
        S: (p,) float64, descending and >= 0, with p = min(out, in, r).
    """

    S: torch.Tensor
    _left: tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # geqrf of lora_B, its tau, core's U
    _right: tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # the same of lora_Aᵀ, core's V

    def vectors(self, rank: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """(U (out, k), Vh (k, in)) of the ``rank`` largest singular values, all if None.

        Columns of U and rows of Vh are orthonormal, also where S is zero.  The element of
        largest size in each column of U, the first one among equals, is positive.
        """
        k = len(self.S) if rank is None else min(rank, len(self.S))
        U, V = _rotate(*self._left, k), _rotate(*self._right, k)
        if k and len(U):
            top = U.gather(0, U.abs().argmax(0, keepdim=True))  # (1, k)
            sign = torch.where(top < 0, -1.0, 1.0).to(U.dtype)
            U, V = U * sign, V * sign
        return U, V.T


def factor_product(lora_B: torch.Tensor, lora_A: torch.Tensor) -> ProductSVD:
    """Decompose lora_B @ lora_A: QR of both factors, then the SVD of R_B R_Aᵀ.

    Args:
        lora_B: (out, r) floating point, finite, any device.
        lora_A: (r, in), same device.

    Returns:
        All p = min(out, in, r) singular values; vectors on demand.  float64, whatever the inputs.

    Notes:
        Cost O((out + in) r² + r³).  No Gram matrix: it would square the condition number and
        lose every singular value below 1e-8 of the first one.  The error of a singular value is
        a small multiple of 2⁻⁵² ‖lora_B‖ ‖lora_A‖.

    References:
        Golub & Van Loan 2013, sec. 5.2 and 8.6.
    """
    left, left_tau = torch.geqrf(lora_B.double())
    right, right_tau = torch.geqrf(lora_A.double().T.contiguous())
    core = _upper(left) @ _upper(right).T  # (min(out, r), min(in, r))
    U, S, Vh = torch.linalg.svd(core, full_matrices=False)
    return ProductSVD(S, (left, left_tau, U), (right, right_tau, Vh.T))


def product_svd(
    lora_B: torch.Tensor, lora_A: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Factor a product of two thin matrices without forming it.

        lora_B @ lora_A = U diag(S) Vh

    Args:
        lora_B: (out, r) floating point, finite, any device.
        lora_A: (r, in), same device.

    Returns:
        U (out, p), S (p,) descending and >= 0, Vh (p, in), float64, p = min(out, in, r); signs
        as in `ProductSVD.vectors`.
    """
    found = factor_product(lora_B, lora_A)
    U, Vh = found.vectors()
    return U, found.S, Vh


def product_spectrum(lora_B: torch.Tensor, lora_A: torch.Tensor) -> torch.Tensor:
    """The singular values of lora_B @ lora_A alone: (p,) float64, descending."""
    left = torch.linalg.qr(lora_B.double(), mode="r").R
    right = torch.linalg.qr(lora_A.double().T, mode="r").R
    values: torch.Tensor = torch.linalg.svdvals(left @ right.T)
    return values


def split_factors(
    U: torch.Tensor, S: torch.Tensor, Vh: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k leading components as balanced factors.

    Args:
        U: (out, >= k).
        S: (>= k,) >= 0.
        Vh: (>= k, in).
        k: rank of the result.

    Returns:
        lora_B = U √S (out, k) and lora_A = √S Vh (k, in): equal norms, which keeps both inside
        the range of float16 for as long as possible.
    """
    root = S[:k].sqrt()
    return U[:, :k] * root, root[:, None] * Vh[:k]


def _upper(packed: torch.Tensor) -> torch.Tensor:
    """R (min(m, r), r) of a packed QR decomposition."""
    return packed[: min(packed.shape)].triu()


def _rotate(
    packed: torch.Tensor, tau: torch.Tensor, inner: torch.Tensor, rank: int
) -> torch.Tensor:
    """Q[:, :q] @ inner[:, :rank] with Q kept as reflections."""
    short = min(packed.shape)
    padded = packed.new_zeros(packed.shape[0], rank)
    padded[:short] = inner[:, :rank]
    if not padded.numel() or not short:
        return padded
    turned: torch.Tensor = torch.ormqr(packed[:, :short], tau, padded)
    return turned
