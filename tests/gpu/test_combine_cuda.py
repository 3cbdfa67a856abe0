"""Element-wise methods straight into a base: CUDA against the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import loratool as lt
from tests.make import randn, random_factors, save_adapter, save_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SHAPES = {"model.layers.0.q_proj": (1024, 768), "model.layers.0.up_proj": (2000, 768)}


@pytest.mark.parametrize("method", ["ties", "dare", "magnitude", "della", "sce", "breadcrumbs"])
def test_cuda_equals_cpu(method: str, tmp_path: Path) -> None:
    """Float32 output has float64 sums on both; other cuts move an element by their rounding."""
    tensors = {f"{n}.weight": randn(*s, seed=i) for i, (n, s) in enumerate(SHAPES.items())}
    base = save_checkpoint(tmp_path / "base", tensors)
    adapters = [
        str(save_adapter(tmp_path / f"a{i}", random_factors(SHAPES, rank=8, seed=70 * i)))
        for i in range(3)
    ]
    found = []
    for device in ("cpu", "cuda"):
        lt.merge(adapters, base=base, output=tmp_path / device, method=method, device=device)
        found.append(load_file(str(tmp_path / device / "model.safetensors")))
    for name, one in found[0].items():
        assert float((one - found[1][name]).abs().max()) <= 2.0**-22 * float(one.abs().max())
