"""The SVD of a product of factors, against dense SVD of the product in float64."""

from __future__ import annotations

import pytest
import torch

from loratool.linalg.product import factor_product, product_spectrum, product_svd, split_factors

EPS = 2.0**-52
SHAPES = [(64, 48, 8), (48, 64, 8), (5, 40, 9), (40, 5, 9), (3, 4, 12), (7, 7, 7), (10, 12, 1)]


def _factors(out: int, inner: int, rank: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(out, rank, generator=generator),
        torch.randn(rank, inner, generator=generator),
    )


def _with_spectrum(
    out: int, inner: int, sigma: torch.Tensor, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors whose product has the singular values sigma, mixed by a rotation inside."""
    B, A = _factors(out, inner, len(sigma), seed)
    U = torch.linalg.qr(B.double()).Q
    V = torch.linalg.qr(A.double().T).Q
    turn = torch.linalg.qr(_factors(len(sigma), 1, len(sigma), seed + 1)[0].double()).Q
    return U * sigma @ turn, turn.T @ V.T


@pytest.mark.parametrize(("out", "inner", "rank"), SHAPES)
def test_equals_dense_svd(out: int, inner: int, rank: int) -> None:
    B, A = _factors(out, inner, rank)
    U, S, Vh = product_svd(B, A)
    dense = B.double() @ A.double()
    expected = torch.linalg.svdvals(dense)[: min(out, inner, rank)]
    size = float(torch.linalg.vector_norm(B) * torch.linalg.vector_norm(A))
    tolerance = 8 * (rank + 8) * EPS * size  # Householder QR and the core's SVD: a few n·eps each
    assert S.dtype == torch.float64
    assert U.shape == (out, len(S))
    assert Vh.shape == (len(S), inner)
    assert (S - expected).abs().max() <= tolerance
    assert torch.linalg.vector_norm(U * S @ Vh - dense) <= tolerance
    eye = torch.eye(len(S), dtype=torch.float64)
    assert (U.T @ U - eye).abs().max() <= 32 * max(out, rank) * EPS
    assert (Vh @ Vh.T - eye).abs().max() <= 32 * max(inner, rank) * EPS
    assert (product_spectrum(B, A) - S).abs().max() <= tolerance


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6])
def test_small_values_are_right(condition: float) -> None:
    sigma = torch.logspace(0, -torch.log10(torch.tensor(condition)), 16, dtype=torch.float64)
    S = product_svd(*_with_spectrum(200, 150, sigma))[1]
    assert ((S - sigma) / sigma).abs().max() <= 200 * EPS * condition  # absolute error, over σ


def test_rank_deficient_and_zero() -> None:
    B, A = _factors(30, 20, 4)
    S = product_svd(torch.cat([B, B], 1), torch.cat([A, A]))[1]
    assert (S[4:] <= 1e-13 * S[0]).all()
    U, S, Vh = product_svd(torch.zeros(6, 3), torch.zeros(3, 5))
    assert S.tolist() == [0.0, 0.0, 0.0]
    eye = torch.eye(3, dtype=torch.float64)
    assert torch.equal(U.T @ U, eye)
    assert torch.equal(Vh @ Vh.T, eye)
    assert product_svd(torch.zeros(6, 0), torch.zeros(0, 5))[1].numel() == 0


def test_signs_are_fixed() -> None:
    B, A = _factors(40, 30, 6)
    U, _, Vh = product_svd(B, A)
    assert (U.gather(0, U.abs().argmax(0, keepdim=True)) > 0).all()
    flip = torch.tensor([1.0, -1, 1, -1, -1, 1])
    U2, _, Vh2 = product_svd(B * flip, flip[:, None] * A)  # the same product
    assert torch.allclose(U, U2, atol=1e-12)
    assert torch.allclose(Vh, Vh2, atol=1e-12)


def test_leading_vectors_are_those_of_the_whole() -> None:
    found = factor_product(*_factors(40, 30, 6))
    U, Vh = found.vectors()
    U2, Vh2 = found.vectors(2)
    assert torch.allclose(U[:, :2], U2, atol=1e-14)
    assert torch.allclose(Vh[:2], Vh2, atol=1e-14)


def test_inputs_are_left_alone() -> None:
    B, A = (f.double() for f in _factors(40, 30, 6))
    before = B.clone(), A.clone()
    product_svd(B, A)
    assert torch.equal(B, before[0])
    assert torch.equal(A, before[1])


def test_split_is_balanced() -> None:
    B, A = _factors(40, 30, 6)
    U, S, Vh = product_svd(B, A)
    left, right = split_factors(U, S, Vh, 3)
    assert torch.allclose(left @ right, U[:, :3] * S[:3] @ Vh[:3], atol=1e-12)
    assert torch.allclose(left.norm(dim=0), right.norm(dim=1), rtol=1e-12)
