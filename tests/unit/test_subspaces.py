"""Leading directions of matrices of full rank, without decomposing them whole."""

from __future__ import annotations

import pytest
import torch

from loratool.linalg.subspaces import (
    DIRECTIONS,
    Spectral,
    difference_norm,
    inner_product,
    principal_angles,
    spectral,
    subspace_similarity,
)

Pair = tuple[torch.Tensor, torch.Tensor]


def matrix(rows: int, cols: int, seed: int) -> torch.Tensor:
    """Of full rank, with leading values that stand apart as those of trained weights do."""
    made = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)).double()
    return made * torch.linspace(1, 0.1, cols, dtype=torch.float64) ** 2 + 0.01 * made.flip(0)


def pair(one: torch.Tensor) -> Pair:
    rows, cols = one.shape
    eye = torch.eye(min(rows, cols), dtype=torch.float64)
    return (one, eye) if rows >= cols else (eye, one)


def by_svd(one: torch.Tensor) -> Spectral:
    U, S, Vh = torch.linalg.svd(one, full_matrices=False)
    return Spectral(U, S, Vh.T)


@pytest.mark.parametrize(("rows", "cols"), [(288, 288), (300, 260), (260, 300)])
def test_what_is_said_is_that_of_the_decomposition(rows: int, cols: int) -> None:
    """eps · (σ₁/gap)² at the most, of gaps of 1e-3."""
    first, second = matrix(rows, cols, 1), matrix(rows, cols, 2)
    one, two = spectral(*pair(first)), spectral(*pair(second))
    assert one.whole is not None and two.whole is not None and one.U.shape[1] == DIRECTIONS
    left, right = by_svd(first), by_svd(second)
    assert one.square == pytest.approx(left.square, rel=1e-13)
    assert torch.allclose(one.S, left.S[:DIRECTIONS], rtol=1e-12, atol=0)
    scale = (left.square * right.square) ** 0.5
    assert inner_product(one, two) == pytest.approx(inner_product(left, right), abs=1e-13 * scale)
    for side, (p, q) in {"U": (left.U, right.U), "V": (left.V, right.V)}.items():
        mine = subspace_similarity(getattr(one, side), getattr(two, side))
        assert torch.allclose(mine, subspace_similarity(p, q)[:DIRECTIONS, :DIRECTIONS], atol=1e-8)
    for mine, p, q in zip(zip(one.spans, two.spans, strict=True), (left.U, left.V),
                          (right.U, right.V), strict=True):  # fmt: skip
        assert torch.allclose(principal_angles(*mine), principal_angles(p, q), atol=1e-7)
    assert difference_norm(pair(first), pair(second)) == pytest.approx(
        float((first - second).norm()), rel=1e-13)  # fmt: skip


@pytest.mark.parametrize("rank", [3, 100, 299])
def test_a_matrix_that_has_not_full_rank_is_decomposed(rank: int) -> None:
    made = matrix(300, rank, 1) @ matrix(rank, 300, 2)
    found = spectral(*pair(made))
    assert found.whole is None and len(found.S) == rank
    assert found.square == pytest.approx(float(made.square().sum()), rel=1e-12)


def test_directions_that_a_gram_matrix_does_not_tell_are_decomposed() -> None:
    values = torch.cat([torch.logspace(0, -4.5, 64), torch.logspace(-4.6, -5, 236)]).double()
    Q = torch.linalg.qr(matrix(300, 300, 3)).Q
    found = spectral(*pair((Q * values) @ torch.linalg.qr(matrix(300, 300, 4)).Q))
    assert found.whole is None and torch.allclose(found.S, values, rtol=1e-9, atol=0)
