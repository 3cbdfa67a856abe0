import pytest
import torch

from loratool.linalg import svd
from tests.make import randn

EPS = 2.0**-52


def with_spectrum(rows: int, cols: int, sigma: torch.Tensor, seed: int) -> torch.Tensor:
    left = torch.linalg.qr(randn(rows, len(sigma), seed=seed).double()).Q
    right = torch.linalg.qr(randn(cols, len(sigma), seed=seed + 1).double()).Q
    return left * sigma @ right.T


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (50, 50)])
@pytest.mark.parametrize("rank", [1, 7, 40])
def test_best_rank_is_the_optimum(shape: tuple[int, int], rank: int) -> None:
    """Eckart–Young: the error is exactly what the dropped singular values hold.

    The Gram matrix carries noise eps·σ₁², which tilts the smallest kept direction σ by
    eps·σ₁²/σ² and so leaves out eps·σ₁²/σ of the matrix; √n such directions add up.
    """
    sigma = torch.logspace(0, -4, 40, dtype=torch.float64)
    matrix = with_spectrum(*shape, sigma, seed=1)
    fit = svd.best_rank(matrix, rank)
    error = float((matrix - fit.lora_B @ fit.lora_A).norm())
    optimum = float(sigma[rank:].norm())
    scale = float(sigma.norm())
    tilt = EPS * float(sigma[0] ** 2 / sigma[rank - 1]) * 40**0.5
    assert error <= optimum * (1 + 1e-9) + 10 * EPS * scale + tilt
    assert torch.allclose(fit.singular_values, sigma[:rank], rtol=1e-7, atol=0)
    assert fit.captured == pytest.approx(1 - optimum**2 / scale**2, abs=1e-12)


def test_full_rank_returns_the_matrix_whatever_its_condition() -> None:
    sigma = torch.logspace(0, -12, 30, dtype=torch.float64)
    matrix = with_spectrum(50, 30, sigma, seed=2)
    fit = svd.best_rank(matrix, 30)
    assert float((matrix - fit.lora_B @ fit.lora_A).abs().max()) <= 200 * EPS


@pytest.mark.parametrize("shape", [(20, 7), (7, 20), (9, 9), (1, 5)])
def test_whole_is_bit_exact_in_float32(shape: tuple[int, int]) -> None:
    matrix = randn(*shape, seed=7, scale=1e-3) * torch.logspace(-8, 3, shape[1])
    fit = svd.whole(matrix)
    lora_A, lora_B = fit.lora_A.float(), fit.lora_B.float()
    assert lora_A.shape[0] == min(shape)
    assert torch.equal(lora_B @ lora_A, matrix)
    assert float(lora_B.norm() / lora_A.norm()) == pytest.approx(1, rel=1.0)
    assert torch.equal(svd.whole(torch.zeros(shape)).lora_B @ svd.whole(torch.zeros(shape)).lora_A,
                       torch.zeros(shape, dtype=torch.float64))  # fmt: skip


def test_factors_are_balanced() -> None:
    fit = svd.best_rank(randn(30, 20, seed=3), 5)
    root = fit.singular_values.sqrt()
    assert torch.allclose(fit.lora_B.norm(dim=0), root)
    assert torch.allclose(fit.lora_A.norm(dim=1), root)


@pytest.mark.parametrize("rank", [1, 3, 9])
def test_rank_deficient_and_zero(rank: int) -> None:
    matrix = randn(20, 3, seed=4).double() @ randn(3, 12, seed=5).double()
    fit = svd.best_rank(matrix, rank)
    best = torch.linalg.svdvals(matrix)[rank:].norm()
    error = (matrix - fit.lora_B @ fit.lora_A).norm()
    assert float(error) <= float(best) * (1 + 1e-9) + 1e-12
    zero = svd.best_rank(torch.zeros(6, 4), 2)
    assert float(zero.lora_B.abs().sum()) == 0 and zero.captured == 1 and zero.norm == 0


def test_top_and_bottom_parts_add_up() -> None:
    matrix = randn(12, 9, seed=6).double()
    top_left, top_right = svd.top_part(matrix, 5)
    low_left, low_right = svd.bottom_part(matrix, 4)
    total = top_left @ top_right + low_left @ low_right
    assert float((total - matrix).abs().max()) <= 1000 * EPS
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    want = U[:, :5] * S[:5] @ Vh[:5]
    assert torch.allclose(top_left @ top_right, want, atol=1e-12)
