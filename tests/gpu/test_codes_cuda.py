"""Quantised bases and LoHa on a GPU: the bytes of the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import loratool as lt
from tests.oracle.test_codes import MAKERS, base_and_style, gpt_oss
from tests.oracle.test_fp8 import block_base, style
from tests.oracle.test_loha import sample

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def weights(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return {f.name: f.read_bytes() for f in files}


def merged(folder: Path, device: str, **options: Any) -> dict[str, bytes]:
    """The weights of ``base`` and ``style`` merged on a device."""
    lt.merge([folder / "style"], base=folder / "base", output=folder / device, device=device,
             provenance=False, **options)  # fmt: skip
    return weights(folder / device)


@pytest.mark.parametrize("how", ["dequantize", "requant"])
@pytest.mark.parametrize("rho", [0.1, 3.0])
def test_fp8(tmp_path: Path, how: str, rho: float) -> None:
    block_base(tmp_path / "base")
    style(tmp_path / "style", rho=rho)
    options: Any = {how: True}
    assert merged(tmp_path, "cpu", **options) == merged(tmp_path, "cuda", **options)


@pytest.mark.parametrize("name", MAKERS)
def test_weights_in_codes(tmp_path: Path, name: str) -> None:
    base_and_style(name, tmp_path)
    options: Any = {"dequantize": True, "exact": True}
    assert merged(tmp_path, "cpu", **options) == merged(tmp_path, "cuda", **options)


@pytest.mark.parametrize("how", ["dequantize", "requant"])
def test_mxfp4(tmp_path: Path, how: str) -> None:
    gpt_oss(tmp_path)
    options: Any = {how: True} | ({"exact": True} if how == "dequantize" else {})
    assert merged(tmp_path, "cpu", **options) == merged(tmp_path, "cuda", **options)


def test_a_simulated_base(tmp_path: Path) -> None:
    from tests.oracle.test_simulate_quant import base_and_style as plain

    plain(tmp_path)
    options: Any = {"simulate_quant": "nf4", "exact": True}
    assert merged(tmp_path, "cpu", **options) == merged(tmp_path, "cuda", **options)


@pytest.mark.parametrize("name", ["loha", "loha_conv_eff", "lycoris_loha_tucker"])
def test_loha(tmp_path: Path, name: str) -> None:
    adapter, base, _ = sample(name, tmp_path)
    made = []
    for device in ("cpu", "cuda"):
        out = tmp_path / (f"{device}.safetensors" if base.is_file() else device)
        lt.merge([adapter], base=base, output=out, device=device, provenance=False)
        made.append(list(weights(out).values()))
    assert made[0] == made[1]
