"""What `inspect` warns of and notes about files of image and video models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import loratool as lt


def written(
    path: Path, ranks: Mapping[str, int], metadata: Mapping[str, str] = {}, *,
    alpha: object = np.float32(4),
) -> Path:  # fmt: skip
    tensors = {}
    for module, rank in ranks.items():
        tensors[f"lora_unet_{module}.lora_down.weight"] = np.ones((rank, 16), np.float32)
        tensors[f"lora_unet_{module}.lora_up.weight"] = np.ones((48, rank), np.float32)
        tensors[f"lora_unet_{module}.alpha"] = np.asarray(alpha)
    save_file(tensors, path, dict(metadata))
    return path


def said(path: Path) -> str:
    report = lt.inspect(path)
    return "\n".join([*report.warnings, *report.notes])


def test_split_qkv(tmp_path: Path) -> None:
    ranks = {"double_blocks_0_img_attn_qkv": 12, "double_blocks_0_img_attn_proj": 4,
             "single_blocks_0_linear1": 16}  # fmt: skip
    args = {"ss_network_args": json.dumps({"split_qkv": "True"}), "ss_network_dim": "4"}
    text = said(written(tmp_path / "a.safetensors", ranks, args))
    assert "1 fused module has 3 ranks of 4" in text and "1/4 of what" in text
    for other in ({**args, "ss_network_dim": "x"}, {**args, "ss_network_args": "[" * 9000},
                  {**args, "ss_network_args": '{"split_qkv": false}'}):  # fmt: skip
        assert "split_qkv" not in said(written(tmp_path / "b.safetensors", ranks, other))


def test_fused_and_split_keys(tmp_path: Path) -> None:
    both = {"layers_0_attention_qkv": 4, "layers_0_attention_to_q": 4, "layers_1_attention_qkv": 4}
    assert "1 module is there fused and split" in said(written(tmp_path / "a.safetensors", both))
    apart = {"layers_0_attention_qkv": 4, "layers_1_attention_to_q": 4}
    assert "fused and split" not in said(written(tmp_path / "b.safetensors", apart))


def test_alphas(tmp_path: Path) -> None:
    ranks = {"blocks_0_self_attn_q": 4}
    text = said(written(tmp_path / "a.safetensors", ranks, alpha=np.int64(8)))
    assert "1 alpha is stored as a whole number (I64)" in text and "odd scaling" not in text
    text = said(written(tmp_path / "a.safetensors", ranks, alpha=np.float32(128)))
    assert "odd scaling: 32 (alpha 128 at rank 4)" in text


@pytest.mark.parametrize("name, other", [
    ("x_high_noise", "x_low_noise"), ("x_low_noise", "x_high_noise"), ("X-HIGH", "X-LOW"),
    ("High Noise x", "Low Noise x"), ("wan-low-v2", "wan-high-v2"),
])  # fmt: skip
def test_the_other_half(tmp_path: Path, name: str, other: str) -> None:
    path = written(tmp_path / f"{name}.safetensors", {"blocks_0_self_attn_q": 4})
    assert ("is not here" in said(path)) == ("noise" in name.lower())
    written(tmp_path / f"{other}.safetensors", {"blocks_0_self_attn_q": 4})
    assert f"{other}.safetensors beside it" in said(path)


@pytest.mark.parametrize("name", ["highlight", "slow", "follow-me", "x"])
def test_other_names_are_no_halves(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / f"{name}.safetensors", {"blocks_0_self_attn_q": 4})
    assert "half" not in said(path)
