"""Sums of products of thin matrices as one product, and its size."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def concat_factors(
    terms: Sequence[tuple[torch.Tensor, torch.Tensor, float]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ c_t · B_t A_t as one product: [c_1 B_1 … c_T B_T] · [A_1; …; A_T].

    Exact in ΔW up to one rounding of each element of B; none where c_t is a power of two.

    Args:
        terms: (lora_B (out, r_t), lora_A (r_t, in), c_t), same dtype and device.

    Returns:
        lora_B (out, Σr_t) and lora_A (Σr_t, in).

    Notes:
        Cost O((out + in) Σr_t).
    """
    lora_B = torch.cat([one if c == 1 else one * c for one, _, c in terms], dim=1)
    return lora_B, torch.cat([one for _, one, _ in terms], dim=0)


def product_norm(lora_B: torch.Tensor, lora_A: torch.Tensor) -> float:
    """‖lora_B @ lora_A‖_F from triangular factors: a trace of Gram matrices would cancel."""
    R_B = torch.linalg.qr(lora_B, mode="r").R
    R_A = torch.linalg.qr(lora_A.T, mode="r").R
    return float(torch.linalg.matrix_norm(R_B @ R_A.T))


def difference_square(
    one: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor]
) -> float:
    """‖B'A' - BA‖_F² of factors of the same shapes that are nearly the same.

    With dB = B' - B and dA = A' - A the difference is dB A' + B dA, whose Gram matrices do not
    cancel as those of the products would.

    Args:
        one: B' (out, r) and A' (r, in), float64.
        other: B and A.

    Notes:
        Cost O((out + in) r²), memory one more copy of the factors.
    """
    (B_one, A_one), (B_other, A_other) = one, other
    d_B, d_A = B_one - B_other, A_one - A_other
    left = (d_B.T @ d_B) * (A_one @ A_one.T) + 2 * (d_B.T @ B_other) * (A_one @ d_A.T)
    return max(0.0, float((left + (B_other.T @ B_other) * (d_A @ d_A.T)).sum()))
