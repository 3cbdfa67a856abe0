"""Block Lanczos against matrices whose best approximation is known."""

from __future__ import annotations

import pytest
import torch

from loratool.linalg import lanczos
from loratool.linalg.fit import residual_square, truncate
from loratool.linalg.lanczos import block_lanczos, is_worthwhile, orthonormalise
from tests.make import randn
from tests.spectra import SPECTRA, known_matrix

EPS = 2.0**-24  # half a spacing of float32


def floor(matrix: torch.Tensor) -> float:
    """What float32 takes whatever the method: storing two factors rounds each element of D by
    eps twice, and the sums of n products behind them are off by √n·eps.
    """
    return EPS * (2 + max(matrix.shape) ** 0.5) * square(matrix) ** 0.5


def square(matrix: torch.Tensor) -> float:
    return float(matrix.double().square().sum())


def check(matrix: torch.Tensor, rank: int, excess: float, seed: int = 0) -> None:
    """Residual against the optimum, and the certificate against the residual."""
    sigma = torch.linalg.svdvals(matrix.double())
    total = square(matrix)
    found = truncate(matrix[None], rank, seeds=[seed], squares=[total])
    optimum = float(sigma[rank:].norm())
    made = found.lora_B[0].double() @ found.lora_A[0].double()
    residual = float((matrix.double() - made).norm())
    assert residual <= optimum * (1 + excess) + floor(matrix)
    certified = total - float(found.singular_values.square().sum())
    assert abs(certified - residual**2) <= 1e-5 * total
    told = residual_square(matrix[None], found.lora_B, found.lora_A)
    assert abs(told - residual**2) <= 1e-6 * residual**2 + floor(matrix) ** 2


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("shape", [(300, 200), (200, 300)])
@pytest.mark.parametrize("rank", [4, 16, 32])
def test_residual_is_the_optimum(kind: str, shape: tuple[int, int], rank: int) -> None:
    matrix, flat_from = known_matrix(kind, *shape, seed=rank)
    check(matrix, rank, 1e-3 if rank >= flat_from else 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(200))
def test_residual_is_the_optimum_on_200_matrices(number: int) -> None:
    """Four kinds, ten shapes up to 2048, five ranks: every combination once."""
    shapes = [
        (256, 256), (256, 1024), (1024, 256), (400, 640), (640, 400), (512, 2048), (2048, 512),
        (768, 768), (1024, 1024), (2048, 2048),
    ]  # fmt: skip
    kind = list(SPECTRA)[number % 4]
    rows, cols = shapes[number // 4 % 10]
    rank = (1, 8, 16, 32, 64)[number // 40]
    matrix, flat_from = known_matrix(kind, rows, cols, seed=1000 + number)
    check(matrix, rank, 1e-3 if rank >= flat_from else 1e-4, seed=number)


def test_small_singular_values_are_right_where_the_gap_is_wide() -> None:
    sigma = torch.tensor([1.0, 0.5, 0.1, 1e-2, 1e-3, 1e-4], dtype=torch.float64)
    left = torch.linalg.qr(randn(200, 6, seed=1).double()).Q
    right = torch.linalg.qr(randn(150, 6, seed=2).double()).Q
    matrix = (left * sigma @ right.T).float()
    found = truncate(matrix[None], 6, seeds=[3], squares=[square(matrix)])
    error = (found.singular_values[0] - sigma).abs()
    assert float(error.max()) <= floor(matrix)


@pytest.mark.parametrize("rank", [2, 3, 9])
def test_rank_deficient(rank: int) -> None:
    matrix = (randn(120, 3, seed=4).double() @ randn(3, 90, seed=5).double()).float()
    check(matrix, rank, 1e-4)
    found = block_lanczos(matrix[None], rank, seeds=[1], squares=[square(matrix)])
    assert bool(torch.isfinite(found.left).all())


def test_zero_matrix() -> None:
    found = truncate(torch.zeros(1, 90, 70), 5, seeds=[1], squares=[0.0])
    assert float(found.lora_B.abs().sum()) == 0 and float(found.singular_values.sum()) == 0


def test_more_than_the_short_side_falls_back_to_all_of_it() -> None:
    matrix = randn(20, 9, seed=6)
    found = truncate(matrix[None], 50, seeds=[1], squares=[square(matrix)])
    assert found.lora_B.shape == (1, 20, 9)
    assert float((matrix - found.lora_B[0] @ found.lora_A[0]).abs().max()) <= 1e-5
    assert not is_worthwhile(matrix.shape, 1)


def test_scale_does_not_matter() -> None:
    """Weights of 1e-18 and of 1e18 have the same directions (float32 ends at 1e±38)."""
    matrix, _ = known_matrix("slow", 200, 150, seed=7)
    for power in (-60, 60):
        scaled = matrix * 2.0**power
        check(scaled, 8, 1e-4)


def test_company_and_order_do_not_change_the_start() -> None:
    """Batched: other matrices may cost steps, but the error is as good."""
    matrices = [known_matrix(kind, 160, 220, seed=8)[0] for kind in SPECTRA]
    stack = torch.stack(matrices)
    found = truncate(stack, 8, seeds=[1, 2, 3, 4], squares=[square(m) for m in matrices])
    for matrix, lora_B, lora_A in zip(matrices, found.lora_B, found.lora_A, strict=True):
        optimum = float(torch.linalg.svdvals(matrix.double())[8:].square().sum())
        assert (
            residual_square(matrix[None], lora_B[None], lora_A[None])
            <= optimum * 1.002 + floor(matrix) ** 2
        )


def test_same_seed_same_bytes_other_seed_same_error() -> None:
    matrix, _ = known_matrix("slow", 300, 300, seed=9)
    one, two, other = (
        truncate(matrix[None], 8, seeds=[s], squares=[square(matrix)]) for s in (1, 1, 2)
    )
    assert torch.equal(one.lora_B, two.lora_B) and torch.equal(one.lora_A, two.lora_A)
    assert not torch.equal(one.lora_B, other.lora_B)
    # the sign convention fixes the directions up to rounding
    assert torch.allclose(one.lora_B[..., :4], other.lora_B[..., :4], atol=1e-3)


def test_orthonormalise_survives_collinear_columns() -> None:
    block = randn(1, 80, 6, seed=10)
    block[:, :, 3] = block[:, :, 1] * (1 + 1e-7)
    block[:, :, 5] = 0
    basis = torch.linalg.qr(randn(80, 4, seed=11)).Q[None]
    floor = torch.full((1,), 1e-7, dtype=torch.float64)
    Q = orthonormalise(block, basis, floor)[0].double()
    gram = Q.T @ Q
    lengths = gram.diagonal()
    assert torch.allclose(gram, torch.diag(lengths), atol=1e-6)
    assert int((lengths > 0.5).sum()) == 4 and float(lengths[lengths <= 0.5].sum()) < 1e-9
    assert float((basis[0].double().T @ Q).abs().max()) <= 1e-6


def test_exact_agrees() -> None:
    matrix, _ = known_matrix("noise", 300, 200, seed=12)
    exact = truncate(matrix[None], 8, seeds=[1], squares=[square(matrix)], exact=True)
    sigma = torch.linalg.svdvals(matrix.double())[:8]
    assert torch.allclose(exact.singular_values[0], sigma, rtol=1e-10, atol=0)


@pytest.mark.parametrize("failures", [0, 1, 2])
def test_an_eigensolver_that_gives_up(failures: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decomposition comes by another way, as good as the first one's."""
    factor = randn(40, 40, seed=1).double() * torch.logspace(0, -14, 40, dtype=torch.float64)
    gram = factor.T @ factor
    real, left = torch.linalg.eigh, [failures]

    def eigh(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        left[0] -= 1
        if left[0] >= 0:
            raise RuntimeError("failed to converge")
        return tuple(real(matrix))

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    values, vectors = (found[0] for found in lanczos._eigh(gram[None]))
    assert bool((values.diff() >= 0).all())
    unit = 2.0**-53 * 40 * 40  # rounding of products of 40 terms, of the solvers' backward error
    assert float((vectors.T @ vectors - torch.eye(40)).abs().max()) < unit
    size = float(values.max())
    assert float((vectors * values @ vectors.T - gram).abs().max()) < unit * size
