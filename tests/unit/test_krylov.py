"""Leading vectors and overlaps from products alone, against dense decompositions."""

from __future__ import annotations

import pytest
import torch

from loratool.linalg import intruders
from loratool.linalg.intruders import find_intruders
from loratool.linalg.krylov import largest_overlaps, leading_components


def matrix(rows: int, cols: int, seed: int, *, above: int = 24) -> torch.Tensor:
    """A flat bulk, and ``above`` directions that stick out of it, falling off."""
    g = torch.Generator().manual_seed(seed)
    bulk = torch.randn(rows, cols, generator=g).double() / max(rows, cols) ** 0.5
    left, right = (torch.linalg.qr(torch.randn(n, above, generator=g).double()).Q
                   for n in (rows, cols))  # fmt: skip
    return bulk + (left * (50 * 0.85 ** torch.arange(above).double())) @ right.T


def change(rows: int, cols: int, seed: int, size: float, rank: int = 6) -> torch.Tensor:
    g = torch.Generator().manual_seed(100 + seed)
    left, right = (torch.randn(*s, generator=g).double() for s in ((rows, rank), (rank, cols)))
    return size * left @ right / (rows * cols) ** 0.5


SHAPES = [(240, 300), (300, 240), (260, 260), (420, 130)]


@pytest.mark.parametrize("shape", [(420, 500), (500, 420), (450, 450)], ids=str)
def test_leading_components(shape: tuple[int, int]) -> None:
    W = matrix(*shape, seed=1)
    found = leading_components(W, 10)
    assert found is not None
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    assert torch.allclose(found[1], S[:10], rtol=1e-12)
    for got, want in ((found[0].T, U[:, :10].T), (found[2], Vh[:10])):
        assert float(1 - (got * want).sum(1).abs().min()) <= 1e-13  # angles below 5e-7
        assert torch.allclose(got @ got.T, torch.eye(10).double(), atol=1e-9)
    assert leading_components(matrix(*shape, seed=2, above=0), 10) is None  # no gaps to be seen


def test_leading_components_of_few_directions() -> None:
    left = torch.linalg.qr(torch.randn(200, 4).double()).Q
    W = (left * torch.tensor([4.0, 3.0, 2.0, 1.0]).double()) @ torch.eye(4, 180).double()
    found = leading_components(W, 10)
    assert found is not None
    assert torch.allclose(found[1][:4], torch.tensor([4.0, 3.0, 2.0, 1.0]).double())
    assert float(found[1][4:].max()) <= 1e-7 and not any(bool(t.isnan().any()) for t in found)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_overlaps_are_exact_or_bounds(shape: tuple[int, int], seed: int) -> None:
    """Vectors from nearly W's own to strangers; what is not decided is said to be so."""
    W = matrix(*shape, seed=seed)
    changed = W + change(*shape, seed=seed, size=2.0 ** (seed - 2))
    U = torch.linalg.svd(changed, full_matrices=False).U[:, :10]
    want = (U.T @ torch.linalg.svd(W, full_matrices=False).U).abs().amax(1)
    for k in range(10):
        found = largest_overlaps(W, U[:, k : k + 1], 0.5)
        if found is None:
            continue
        got = float(found.cosine[0])
        if bool(found.is_exact[0]):
            assert got == pytest.approx(float(want[k]), abs=1e-6)
        else:
            assert float(want[k]) <= got + 1e-9 and got < 0.5


@pytest.mark.parametrize("cosine", [0.0, 0.2, 0.49, 0.499999, 0.500001, 0.51, 0.8, 1.0])
@pytest.mark.parametrize("rows", [200, 320])
def test_overlaps_by_construction(cosine: float, rows: int) -> None:
    """A vector with a known part along one direction, the rest spread over all others."""
    g = torch.Generator().manual_seed(4)
    left = torch.linalg.qr(torch.randn(rows, 200, generator=g).double()).Q
    right = torch.linalg.qr(torch.randn(200, 200, generator=g).double()).Q
    values = torch.linspace(1, 2, 200).double()
    values[3] = 3.0
    W = (left * values) @ right.T
    rest = left.sum(1) - left[:, 3]
    if rows > 200:  # and a part outside of all singular vectors, which is larger than any other
        outside = torch.randn(rows, 1, generator=g).double()
        rest = rest / rest.norm() * 0.3 + (outside - left @ (left.T @ outside))[:, 0]
    vector = cosine * left[:, 3] + (1 - cosine**2) ** 0.5 * rest / rest.norm()
    found = largest_overlaps(W, vector[:, None], 0.5)
    assert found is not None
    assert (float(found.cosine[0]) < 0.5) == (cosine < 0.5)
    if bool(found.is_exact[0]):
        assert float(found.cosine[0]) == pytest.approx(max(cosine, 0.0), abs=1e-9)


def test_two_neighbours_share_a_vector() -> None:
    left = torch.linalg.qr(torch.randn(200, 200).double()).Q
    values = torch.linspace(1, 2, 200).double()
    for share, limit in ((0.6, 0.5), (0.45, 0.5)):
        vector = share * (left[:, -1] + left[:, -2])
        rest = left[:, :150].sum(1)
        vector = vector + rest / rest.norm() * (1 - 2 * share**2) ** 0.5
        found = largest_overlaps(left * values, vector[:, None], limit)
        if found is not None:
            assert bool(found.is_exact[0]) and float(found.cosine[0]) == pytest.approx(share)


@pytest.mark.parametrize("above", [0, 24])
@pytest.mark.parametrize("shape", [(420, 500), (500, 420), (420, 130)], ids=str)
def test_intruders_are_those_of_the_decomposition(
    shape: tuple[int, int], above: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where bounds do not decide and Gram matrices are decomposed (above = 0)."""
    for seed in range(3):
        W = matrix(*shape, seed=seed, above=above)
        D = change(*shape, seed=seed, size=8.0**seed)
        want = find_intruders(W, D)
        monkeypatch.setattr(intruders, "_LARGE", 1)
        got = find_intruders(W, D)
        monkeypatch.undo()
        assert got.index == want.index
        is_intruder = want.cosine < 0.5
        assert torch.allclose(got.cosine[~is_intruder], want.cosine[~is_intruder], atol=1e-6)
        assert bool((got.cosine[is_intruder] >= want.cosine[is_intruder] - 1e-6).all())
        assert torch.allclose(got.S, want.S, rtol=1e-10)
        parts = [(f.U[:, i : i + 1] * f.S[i]) @ f.Vh[i : i + 1] for f in (got, want)
                 for i in range(3)]  # fmt: skip
        for one, other in zip(parts[:3], parts[3:], strict=True):
            assert float((one - other).abs().max()) <= 1e-8 * float(other.abs().max())
