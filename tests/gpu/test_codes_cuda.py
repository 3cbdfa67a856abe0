"""Quantised bases and LoHa on a GPU: the bytes of the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import loratool as lt
from tests.oracle.test_fp8 import block_base, style
from tests.oracle.test_loha import sample

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def weights(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return {f.name: f.read_bytes() for f in files}


@pytest.mark.parametrize("how", ["dequantize", "requant"])
@pytest.mark.parametrize("rho", [0.1, 3.0])
def test_fp8(tmp_path: Path, how: str, rho: float) -> None:
    block_base(tmp_path / "base")
    style(tmp_path / "style", rho=rho)
    made = {}
    for device in ("cpu", "cuda"):
        options: Any = {how: True}
        lt.merge([tmp_path / "style"], base=tmp_path / "base", output=tmp_path / device,
                 device=device, provenance=False, **options)  # fmt: skip
        made[device] = weights(tmp_path / device)
    assert made["cpu"] == made["cuda"]


@pytest.mark.parametrize("name", ["loha", "loha_conv_eff", "lycoris_loha_tucker"])
def test_loha(tmp_path: Path, name: str) -> None:
    adapter, base, _ = sample(name, tmp_path)
    made = []
    for device in ("cpu", "cuda"):
        out = tmp_path / (f"{device}.safetensors" if base.is_file() else device)
        lt.merge([adapter], base=base, output=out, device=device, provenance=False)
        made.append(list(weights(out).values()))
    assert made[0] == made[1]
