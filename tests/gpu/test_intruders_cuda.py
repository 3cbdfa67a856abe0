"""Intruder dimensions: CUDA against the CPU."""

from __future__ import annotations

import pytest
import torch

from loratool.linalg.intruders import find_intruders
from tests.unit.test_krylov import change, matrix

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("above", [0, 24])
@pytest.mark.parametrize("shape", [(1024, 1300), (1300, 1024)], ids=str)
def test_cuda_equals_cpu(shape: tuple[int, int], above: int) -> None:
    """The same verdicts by bounds (above > 0) and by decomposition, and the same directions."""
    W, D = matrix(*shape, seed=1, above=above), change(*shape, seed=1, size=20)
    one, other = find_intruders(W, D), find_intruders(W.cuda(), D.cuda()).cpu()
    assert one.index == other.index
    assert torch.allclose(one.S, other.S, rtol=1e-10)
    assert torch.allclose(one.cosine, other.cosine, atol=1e-5)
    first = [(f.U[:, :1] * f.S[0]) @ f.Vh[:1] for f in (one, other)]
    assert float((first[0] - first[1]).abs().max()) <= 1e-8 * float(first[0].abs().max())
