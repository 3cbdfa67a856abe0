"""Which names ComfyUI's key maps have.

What stands here is what its `model_lora_keys_unet` and `model_lora_keys_clip` (comfy/lora.py of
0.19.3, 30860264, and of 17358c8f for models that came later) gave for state dicts of these models.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import loratool as lt
from loratool.archs.families import families
from loratool.dialects.programs import Look, find_program
from loratool.dialects.programs.grammar import Tensor
from tests.oracle.test_image_spellings import CONTROL_BASE, control, rand, write

LOADED = {
    "flux1": (
        "transformer.transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_q",
        "lycoris_single_transformer_blocks_0_proj_mlp",
        "lora_transformer_single_transformer_blocks_0_proj_mlp",
        "diffusion_model.single_blocks.0.linear1_qkv", "lora_unet_double_blocks_0_img_attn_qkv",
        "diffusion_model.double_blocks.0.img_attn.norm.query_norm",
    ),
    "flux_2_dev": ("transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj",
                   "transformer_blocks.0.ff.linear_in", "transformer.x_embedder",
                   "diffusion_model.double_stream_modulation_img.lin"),
    "longcat_image": ("transformer.transformer_blocks.0.attn.to_q",
                      "diffusion_model.time_in.in_layer"),
    "ovis_image": ("transformer.transformer_blocks.0.attn.to_q",
                   "diffusion_model.double_blocks.0.img_mlp.up_proj"),
    "sd3": ("lycoris_transformer_blocks_0_attn_to_q", "lora_unet_joint_blocks_0_x_block_attn_qkv"),
    "hunyuan_video": (
        "diffusion_model.double_blocks.0.img_attn_qkv", "transformer.double_blocks.0.img_mlp.fc1",
        "diffusion_model.double_blocks.0.img_mlp.0", "lora_unet_double_blocks_0_img_attn_qkv",
    ),
    "hunyuan_image": ("diffusion_model.double_blocks.0.img_attn.qkv",),
    "hunyuan_video_1_5": ("diffusion_model.time_r_in.in_layer",),
    "ltx2": ("transformer_blocks.0.audio_attn1.to_q", "diffusion_model.patchify_proj"),
    "hidream_o1": ("model.language_model.layers.0.self_attn.q_proj", "model.x_embedder.proj1",
                   "diffusion_model.visual.blocks.0.attn.qkv"),
    "kandinsky5": ("transformer.visual_transformer_blocks.0.self_attention.to_query",
                   "visual_transformer_blocks.0.self_attention.to_query"),
    "ernie_image": ("transformer.layers.0.self_attention.to_q",),
    "ace_step": ("base_model.model.layers.0.self_attn.q_proj", "lycoris_layers_0_self_attn_q_proj",
                 "diffusion_model.decoder.layers.0.self_attn.q_proj"),
    "minimax_h3": ("blocks.0.attn.qkv_proj",),
    "krea2": ("transformer.transformer_blocks.0.attn.to_q", "text_fusion.projector",
              "lycoris_transformer_blocks_0_ff_gate", "diffusion_model.blocks.0.attn.wq"),
    "z_image": ("diffusion_model.layers.0.attention.to_q", "lycoris_layers_0_attention_to_out_0"),
    "qwen-image-2.1": ("transformer.transformer_blocks.0.img_mlp.gate_layer",),
    "wan": ("diffusion_model.blocks.0.modulation", "lora_unet_blocks_0_self_attn_q"),
    "anima": ("diffusion_model.llm_adapter.blocks.0.self_attn.q_proj",
              "lora_te_layers_0_mlp_up_proj"),
}  # fmt: skip
DROPPED = {
    "flux1": (
        "lora_unet_single_transformer_blocks_0_proj_mlp", "base_model.model.x_embedder",
        "diffusion_model.double_blocks.0.img_attn.norm.query_norm.scale",
        "lora_unet_single_blocks_0_linear1_qkv", "diffusion_model.double_blocks.0.img_attn.qkv.0",
        "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q",
        "lora_te1_text_model_encoder_layers_0_layer_norm1", "lora_te_text_projection",
    ),
    "chroma": ("transformer.distilled_guidance_layer.in_proj",),
    "flux_2_dev": ("transformer.double_stream_modulation_img.linear",
                   "transformer.time_guidance_embed.timestep_embedder.linear_1"),
    "longcat_image": ("transformer.time_embed.timestep_embedder.linear_1",),
    "ovis_image": ("transformer.transformer_blocks.0.ff.net.0.proj",),
    "sd3": ("lora_te2_encoder_block_0_layer_0_SelfAttention_q",),
    "hunyuan_video": ("diffusion_model.double_blocks.0.img_attn_q_norm",
                      "lora_unet_double_blocks_0_img_mlp_fc1"),
    "hunyuan_image": ("diffusion_model.double_blocks.0.img_attn_qkv",),
    "ltx2": ("connectors.text_proj_in", "proj_in"),
    "hidream_o1": ("diffusion_model.model.x_embedder.proj1",),
    "ace_step": ("base_model.model.layers.0.self_attn.to_q",
                 "diffusion_model.layers.0.self_attn.q_proj"),
    "krea2": ("transformer.transformer_blocks.0.attn.to_qkv", "transformer.txt_in.norm"),
    "lumina2": ("transformer.layers.0.attn.to_q", "transformer.layers.0.norm1.linear"),
    "z_image": ("lora_unet_layers_0_attention_to_q",),
    "wan": ("lora_unet_blocks_0_modulation", "lora_unet__blocks_0_self_attn_q"),
    "anima": ("text_conditioner.blocks.0.self_attn.q_proj", "lora_te1_layers_0_mlp_up_proj"),
}  # fmt: skip


def dropped(model: str, stems: tuple[str, ...]) -> set[str]:
    """Those of these modules that the rule on names drops, in a file that states its model."""
    ends = {"lora_A.weight": (2, 8), "lora_B.weight": (8, 2)}
    tensors = {f"{s}.{e}": Tensor("F32", shape) for s in stems for e, shape in ends.items()}
    look = Look(tensors, {"ss_base_model_version": model})
    (rule,) = (r for r in find_program("comfyui").rules if r.name == "unknown-name")
    return {name for hit in rule.finds(look) for name in hit.names}


@pytest.mark.parametrize("model", LOADED)
def test_names_of_the_map(model: str) -> None:
    assert (
        any(model in {v.lower() for v in f.versions} for f in families().values()) or model == "sd3"
    )
    assert dropped(model, LOADED[model]) == set()


@pytest.mark.parametrize("model", DROPPED)
def test_names_that_it_has_not(model: str) -> None:
    assert dropped(model, DROPPED[model]) == set(DROPPED[model])


def test_a_control_lora_keeps_its_norms_in_comfyui(tmp_path: Path) -> None:
    """Tensors that take the base's place are named as ComfyUI's model has them, and go back."""
    adapter = control(tmp_path, 12)
    made = tmp_path / "made.safetensors"
    lt.convert([str(adapter)], to="comfyui", output=made)
    names = set(load_file(str(made)))
    given = {n for n in load_file(str(adapter)) if n.endswith("_norm.scale")}
    assert given and {n for n in names if n.endswith("set_weight")} == {
        f"diffusion_model.{n.removesuffix('scale')}set_weight" for n in given
    }
    assert all(n.startswith("diffusion_model.") for n in names)
    base = write(tmp_path / "base.safetensors", CONTROL_BASE)
    merged = []
    for i, one in enumerate((adapter, made)):
        out = tmp_path / f"{i}.safetensors"
        lt.merge([str(one)], base=base, output=out)
        merged.append(load_file(str(out)))
    assert merged[0].keys() == merged[1].keys()
    assert all(np.array_equal(t, merged[1][n]) for n, t in merged[0].items())
    back = tmp_path / "back.safetensors"
    lt.convert([str(made)], to="bfl", output=back)
    assert {n: t.tobytes() for n, t in load_file(str(back)).items()} == {
        n: t.tobytes() for n, t in load_file(str(adapter)).items()
    }


@pytest.mark.parametrize(("stem", "model", "name"), [
    ("lora_unet_double_blocks_0_img_attn_qkv", "hunyuan_image", "double_blocks.0.img_attn.qkv"),
    ("lora_unet_double_blocks_0_img_mlp_fc1", "hunyuan_video", "double_blocks.0.img_mlp.0"),
    ("lora_unet_layers_0_self_attn_q_proj", "ace_step", "decoder.layers.0.self_attn.q_proj"),
    ("lora_unet_model_language_model_layers_0_self_attn_q_proj", "hidream_o1",
     "language_model.layers.0.self_attn.q_proj"),
])  # fmt: skip
def test_files_for_comfyui_have_the_names_of_its_model(
    tmp_path: Path, stem: str, model: str, name: str
) -> None:
    tensors = {f"{stem}.lora_down.weight": rand(2, 8), f"{stem}.lora_up.weight": rand(24, 2)}
    adapter = write(tmp_path / "a.safetensors", tensors, ss_base_model_version=model)
    made = tmp_path / "made.safetensors"
    lt.convert([str(adapter)], to="comfyui", output=made)
    assert f"diffusion_model.{name}.lora_down.weight" in load_file(str(made))
