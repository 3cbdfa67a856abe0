"""Biases and replaced tensors of image models between the layouts of their checkpoints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import loratool as lt
from tests.oracle.test_convert_image import convert
from tests.oracle.test_fused_traps import LAST, swapped
from tests.oracle.test_image_spellings import DOWN, pair, rand, write
from tests.oracle.test_image_traps import merge, near, product

H = 8
CONTEXT = "lora_unet_joint_blocks_{}_context_block_adaLN_modulation_1"
NORM = "transformer_blocks.{}.norm1_context.linear"


@pytest.mark.parametrize("way", ["convert", "merge"])
def test_a_bias_is_turned_as_its_weight_is(way: str, tmp_path: Path) -> None:
    """SD3's last block alone has 2 · H rows there, (shift, scale), which diffusers turns round."""
    rows = {0: 6 * H, 1: 2 * H}
    tensors, base = {}, {}
    for block, height in rows.items():
        stem = CONTEXT.format(block)
        tensors |= pair(stem, height, H, ways=DOWN)
        tensors[f"{stem}.diff_b"] = rand(height, seed=4)
        base[f"{NORM.format(block)}.weight"] = rand(height, H, seed=6)
        base[f"{NORM.format(block)}.bias"] = rand(height, seed=5)
    if way == "convert":
        adapter = write(tmp_path / "s.safetensors", tensors, ss_base_model_version="sd3_m")
        (tmp_path / "d").mkdir()
        there = convert(adapter, "diffusers", tmp_path / "d")
        got = merge(tmp_path, load_file(str(there)), base)
        back = load_file(str(convert(there, "kohya", tmp_path)))
        for block in rows:
            stem = CONTEXT.format(block)
            assert np.array_equal(back[f"{stem}.diff_b"], tensors[f"{stem}.diff_b"])
            assert near(product(back, stem), product(tensors, stem))
    else:
        got = merge(tmp_path, tensors, base)
    for block in rows:
        stem, name = CONTEXT.format(block), NORM.format(block)
        turn = swapped if block == 1 else np.asarray
        assert near(got[f"{name}.weight"], base[f"{name}.weight"] + turn(product(tensors, stem)))
        assert near(got[f"{name}.bias"], base[f"{name}.bias"] + turn(tensors[f"{stem}.diff_b"]))


def test_a_bias_that_does_not_tell_its_block_is_refused(tmp_path: Path) -> None:
    tensors = pair("lora_unet_joint_blocks_0_x_block_mlp_fc1", 4 * H, H, ways=DOWN)
    tensors[f"{CONTEXT.format(1)}.diff_b"] = rand(2 * H)
    adapter = write(tmp_path / "s.safetensors", tensors, ss_base_model_version="sd3_m")
    assert np.array_equal(  # the original's order stays
        load_file(str(convert(adapter, "comfyui", tmp_path)))[
            "diffusion_model.joint_blocks.1.context_block.adaLN_modulation.1.diff_b"
        ],
        rand(2 * H),
    )
    with pytest.raises(lt.LoratoolError, match="has no form") as caught:
        convert(adapter, "diffusers", tmp_path)
    assert caught.value.code == "LT-494"


@pytest.mark.parametrize("to", ["kohya", "comfyui"])
def test_a_replaced_tensor_goes_under_its_name_and_in_its_order(to: str, tmp_path: Path) -> None:
    """``lora_transformer_`` has the names of diffusers, whose last modulation is turned round."""
    stem = "lora_transformer_single_transformer_blocks_0_norm_linear"
    tensors = pair(stem, 3 * H, H, ways=DOWN)
    tensors["lora_transformer_norm_out_linear.set_weight"] = rand(2 * H, H)
    adapter = write(tmp_path / "s.safetensors", tensors, ss_base_model_version="flux1")
    made = load_file(str(convert(adapter, to, tmp_path)))
    key = {"kohya": LAST, "comfyui": "diffusion_model.final_layer.adaLN_modulation.1"}[to]
    assert np.array_equal(made[f"{key}.set_weight"], swapped(rand(2 * H, H)))
    tensors["lora_transformer_transformer_blocks_0_attn_to_q.set_weight"] = rand(H, H)
    with pytest.raises(lt.LoratoolError, match="has no form") as caught:
        convert(write(tmp_path / "q.safetensors", tensors), to, tmp_path)
    assert caught.value.code == "LT-494" and "--skip ^" in str(caught.value.hint)
