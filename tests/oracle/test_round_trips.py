"""kohya → diffusers → ComfyUI → kohya of every shape of name and factor: the same ΔW.

Ranks and alphas differ from module to module, alphas are of every type and sometimes missing; fused
projections are cut on the way and joined again.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.oracle.dotted_files import deltas as dotted_deltas
from tests.oracle.kohya_files import Array, deltas
from tests.oracle.test_convert_image import convert

# Modules as kohya's files for the family spell them, with the shapes of their weights.
MODELS: dict[str, dict[str, tuple[int, ...]]] = {
    "sd1": {  # the names of diffusers
        "down_blocks.0.attentions.0.proj_in": (16, 16, 1, 1),
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": (16, 768),
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0": (16, 16),
        "down_blocks.0.resnets.0.conv1": (16, 8, 3, 3),
        "down_blocks.0.downsamplers.0.conv": (8, 8, 3, 3),
    },
    "sdxl": {  # the original's
        "input_blocks.4.1.proj_in": (16, 16), "input_blocks.4.0.in_layers.2": (16, 8, 3, 3),
        "input_blocks.7.1.transformer_blocks.9.attn2.to_k": (16, 2048),
        "output_blocks.2.2.conv": (8, 8, 3, 3), "time_embed.2": (16, 16),
        "middle_block.1.transformer_blocks.0.ff.net.0.proj": (64, 16),
    },
    "hunyuan_video": {
        "double_blocks.0.img_attn_qkv": (48, 16), "double_blocks.0.img_attn_proj": (16, 16),
        "double_blocks.1.txt_mlp.fc2": (16, 64), "single_blocks.0.linear1": (112, 16),
        "txt_in.individual_token_refiner.blocks.0.self_attn_qkv": (48, 16),
        "final_layer.adaLN_modulation.1": (32, 16),
    },
    "wan": {
        "blocks.0.self_attn.q": (16, 16), "blocks.0.cross_attn.k_img": (16, 16),
        "blocks.3.ffn.0": (32, 16), "head.head": (8, 16), "text_embedding.0": (16, 8),
        "face_adapter.fuser_blocks.1.linear1_kv": (32, 16),  # Wan-Animate
        "face_adapter.fuser_blocks.0.linear1_q": (16, 16),
    },
    "z_image": {
        "layers.0.attention.qkv": (48, 16), "layers.0.attention.out": (16, 16),
        "noise_refiner.1.attention.qkv": (48, 16), "layers.2.feed_forward.w1": (32, 16),
    },
    "lumina2": {
        "layers.0.attention.qkv": (40, 24), "layers.0.attention.out": (24, 24),
        "layers.1.feed_forward.w3": (32, 24), "cap_embedder.1": (24, 16),
    },
    "sd3": {
        "joint_blocks.0.x_block.attn.qkv": (48, 16),
        "joint_blocks.0.context_block.mlp.fc1": (64, 16),
        "joint_blocks.1.context_block.adaLN_modulation.1": (32, 16),
        "joint_blocks.0.context_block.adaLN_modulation.1": (96, 16),
        "final_layer.adaLN_modulation.1": (32, 16),
    },
    "qwen_image": {
        "transformer_blocks.0.attn.add_q_proj": (16, 16),
        "transformer_blocks.0.img_mlp.net.0.proj": (64, 16),
        "transformer_blocks.1.txt_mod.1": (96, 16),
    },
    "krea2": {
        "blocks.0.attn.wq": (16, 16), "blocks.0.attn.wk": (4, 16), "blocks.1.mlp.gate": (32, 16),
        "txtfusion.layerwise_blocks.0.attn.gate": (8, 8), "tmlp.0": (16, 8),
    },
    "anima": {
        "blocks.0.self_attn.q_proj": (16, 16), "blocks.0.adaln_modulation_cross_attn.2": (16, 16),
        "blocks.1.mlp.layer1": (64, 16), "final_layer.linear": (8, 16),
    },
}  # fmt: skip
MODELS |= {
    "flux2": {
        "double_blocks.0.img_attn.qkv": (48, 16), "single_blocks.0.linear1": (144, 16),
        "single_blocks.0.linear2": (16, 64), "double_stream_modulation_img.lin": (96, 16),
        "final_layer.adaLN_modulation.1": (32, 16),
    },
    "hunyuan_video_15": {
        **{f"double_blocks.0.img_attn_{x}": (16, 16) for x in "qkv"},
        "double_blocks.0.txt_mlp.fc1": (64, 16),
        "vision_in.proj.1": (16, 8),
    },
    "ltx2": {
        "transformer_blocks.0.attn1.to_q": (16, 16), "av_ca_a2v_gate_adaln_single.linear": (16, 16),
        "patchify_proj": (16, 8), "audio_adaln_single.linear": (16, 16),
    },
    "ideogram4": {
        "layers.0.attention.qkv": (48, 16), "layers.0.attention.o": (16, 16),
        "t_embedding.mlp_in": (16, 8),
    },
    "minimax_h3": {
        "blocks.0.attn.qkv_proj": (48, 16), "blocks.0.mlp.fc1": (64, 16),
        "token_refiner.blocks.0.attn.out_proj": (16, 16), "video_patch_proj": (16, 8),
    },
    "auraflow": {
        "double_layers.0.attn.w2q": (16, 16), "double_layers.0.mlpX.c_fc1": (32, 16),
        "single_layers.0.modCX.1": (96, 16), "modF.1": (32, 16),
    },
    "mochi": {
        "blocks.0.attn.qkv_x": (48, 16), "blocks.0.mlp_x.w1": (64, 16), "final_layer.mod": (32, 16),
    },
    "kandinsky5": {
        "visual_transformer_blocks.0.self_attention.to_query": (16, 16),
        "text_transformer_blocks.0.feed_forward.in_layer": (64, 16),
    },
}  # fmt: skip
ALPHAS = (np.array(3, np.int64), np.array(0.3, np.float16), None, np.array(-2.0, np.float32),
          np.array(4.0, np.float64))  # fmt: skip
VERSION = {"sd1": "sd_v1", "sdxl": "sdxl_base_v1-0", "sd3": "sd3_m"}


def kohya(path: Path, family: str) -> Path:
    """A file of the family: of 3 × 3 convolutions every other one has a core."""
    rng, tensors = np.random.default_rng([9, len(family)]), {}
    for i, (module, shape) in enumerate(MODELS[family].items()):
        stem, rank = f"lora_unet_{module.replace('.', '_')}", 2 + i % 3
        out, inner, kernel = shape[0], shape[1], shape[2:]
        one = (1,) * len(kernel)
        has_core = kernel == (3, 3) and i % 2 == 1
        tensors[f"{stem}.lora_up.weight"] = rng.standard_normal((out, rank, *one))
        tensors[f"{stem}.lora_down.weight"] = rng.standard_normal(
            (rank, inner, *(one if has_core else kernel))
        )
        if has_core:
            tensors[f"{stem}.lora_mid.weight"] = rng.standard_normal((rank, rank, *kernel))
        tensors = {k: v.astype(np.float32) if v.ndim else v for k, v in tensors.items()}
        if (alpha := ALPHAS[i % len(ALPHAS)]) is not None:
            tensors[f"{stem}.alpha"] = alpha
    save_file(tensors, str(path), {"ss_base_model_version": VERSION.get(family, family)})
    return path


def same(path: Path, wanted: dict[tuple[str, str], tuple[Array, Array]]) -> None:
    """The same names and, to 1e-6 of the sizes of their terms, the same numbers."""
    found = deltas(path)
    assert found.keys() == wanted.keys()
    for key, (delta, size) in wanted.items():
        got = found[key][0].reshape(delta.shape)
        assert np.abs(got - delta).max() <= 1e-6 * size.max(), key


@pytest.mark.parametrize("way", [["diffusers", "comfyui", "kohya"], ["comfyui", "kohya"]])
@pytest.mark.parametrize("family", MODELS)
def test_there_and_back(family: str, way: list[str], tmp_path: Path) -> None:
    path = first = kohya(tmp_path / "style.safetensors", family)
    for step, to in enumerate(way):
        (tmp_path / str(step)).mkdir()
        path = convert(path, to, tmp_path / str(step))
    same(path, deltas(first))


# Parts of one projection in diffusers' names, their heights, and a module that tells the family.
SPLIT = {
    "flux1": ("single_transformer_blocks.0", {"attn.to_q": 16, "attn.to_k": 16, "attn.to_v": 16,
              "proj_mlp": 64}, "single_transformer_blocks.0.norm.linear"),
    "lumina2": ("layers.0.attn", {"to_q": 24, "to_k": 8, "to_v": 8}, "layers.0.norm1.linear"),
    "z_image": ("layers.0.attention", {"to_q": 16, "to_k": 16, "to_v": 16},
                "all_final_layer.2-1.linear"),
}  # fmt: skip


@pytest.mark.parametrize("trained", ["all", "q and the last"])
@pytest.mark.parametrize("family", SPLIT)
def test_parts_with_ranks_of_their_own_are_joined_and_cut_again(
    family: str, trained: str, tmp_path: Path
) -> None:
    """Each with its rank and alpha; parts that nobody trained come back as nothing."""
    block, heights, telling = SPLIT[family]
    rng, tensors = np.random.default_rng(4), {}
    width = heights[next(iter(heights))]
    names = list(heights) if trained == "all" else [next(iter(heights)), list(heights)[-1]]
    sizes = {f"{block}.{name}": heights[name] for name in names} | {telling: 3 * width}
    for i, (module, height) in enumerate(sizes.items()):
        stem = f"transformer.{module}"
        tensors[f"{stem}.lora_A.weight"] = rng.standard_normal((2 + i, width)).astype("f4")
        tensors[f"{stem}.lora_B.weight"] = rng.standard_normal((height, 2 + i)).astype("f4")
        tensors[f"{stem}.alpha"] = np.array([1, 5, 3, 7, 2][i], np.int64)
    path = first = tmp_path / "style.safetensors"
    save_file(tensors, str(first), {"ss_base_model_version": VERSION.get(family, family)})
    for step, to in enumerate(("comfyui", "kohya", "diffusers")):
        (tmp_path / str(step)).mkdir()
        path = convert(path, to, tmp_path / str(step))
        joined = [k for k in load_file(str(path)) if "qkv" in k or "linear1" in k]
        assert bool(joined) == (to != "diffusers")
    found, wanted = dotted_deltas(path), dotted_deltas(first)
    for key, (delta, _) in found.items():
        before, size = wanted.get(key, (np.zeros(delta.shape), np.ones(1)))
        assert np.abs(delta - before).max() <= 1e-6 * size.max(), key
    assert wanted.keys() <= found.keys()
