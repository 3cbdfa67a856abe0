"""Files of every family that diffusers loads, as `--for diffusers` writes them, in diffusers.

A file of all linear modules of a tiny model, under the names of the original code, is converted,
or mended where `check` says that it does not load, and read by diffusers' own loader; what it
fuses into the model is what our merge of the source gives, to two roundings of each term.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file

import loratool as lt
from loratool.archs.families import families, places
from tests.oracle.in_diffusers import check, in_diffusers, zeroed

pytestmark = pytest.mark.slow


class Tiny(NamedTuple):
    """A family with the smallest model that has its names.

    Attributes:
        family: file of ``archs/data/families``.
        model: class of diffusers.
        loader: of its files.
        sizes: of the model.
    """

    family: str
    model: str
    loader: str
    sizes: Mapping[str, Any]


HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
TINY = (
    Tiny("wan", "WanTransformer3DModel", "WanLoraLoaderMixin", {
        **HEADS, "in_channels": 4, "out_channels": 4, "text_dim": 8, "freq_dim": 8, "ffn_dim": 24,
        "num_layers": 2, "image_dim": 8, "added_kv_proj_dim": 16}),
    Tiny("qwen_image", "QwenImageTransformer2DModel", "QwenImageLoraLoaderMixin", {
        **HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "joint_attention_dim": 8,
        "axes_dims_rope": (2, 2, 4)}),
    Tiny("qwen_image_21", "QwenImage21Transformer2DModel", "QwenImageLoraLoaderMixin", {
        **HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "context_in_dim": 8,
        "axes_dims_rope": (2, 2, 4)}),
    Tiny("z_image", "ZImageTransformer2DModel", "ZImageLoraLoaderMixin", {
        "in_channels": 4, "dim": 16, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2,
        "n_kv_heads": 2, "cap_feat_dim": 8, "axes_dims": [2, 2, 4], "axes_lens": [8, 8, 8]}),
    Tiny("hunyuan_video", "HunyuanVideoTransformer3DModel", "HunyuanVideoLoraLoaderMixin", {
        **HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_single_layers": 2,
        "num_refiner_layers": 1, "text_embed_dim": 8, "pooled_projection_dim": 8,
        "rope_axes_dim": (2, 2, 4)}),
    Tiny("flux2", "Flux2Transformer2DModel", "Flux2LoraLoaderMixin", {
        **HEADS, "in_channels": 4, "num_layers": 2, "num_single_layers": 2,
        "joint_attention_dim": 8, "timestep_guidance_channels": 8, "axes_dims_rope": (2, 2, 2, 2)}),
    Tiny("flux3", "Flux3Transformer2DModel", "Flux3LoraLoaderMixin", {
        **HEADS, "in_channels": 4, "cond_in_channels": 4, "num_layers": 2, "num_single_layers": 2,
        "joint_attention_dim": 8, "timestep_channels": 8, "axes_dims_rope": (2, 2, 2, 2),
        "flow_map": True}),
    Tiny("sana", "SanaTransformer2DModel", "SanaLoraLoaderMixin", {
        **HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "caption_channels": 8,
        "num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16,
        "sample_size": 8}),
    Tiny("sana", "SanaVideoTransformer3DModel", "SanaLoraLoaderMixin", {
        **HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "caption_channels": 8,
        "num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16,
        "sample_size": 8}),
    Tiny("bria_fibo2", "BriaFibo2Transformer2DModel", "BriaFibo2LoraLoaderMixin", {
        "in_channels": 4, "dim": 64, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 4,
        "cap_feat_dim": 8, "injection_layer_ids": (1,), "perceiver_num_layers": 1,
        "min_num_gist_tokens": 4, "max_num_gist_tokens": 8, "axes_dims": (4, 6, 6)}),
    Tiny("sd3", "SD3Transformer2DModel", "SD3LoraLoaderMixin", {
        **HEADS, "sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2,
        "joint_attention_dim": 8, "caption_projection_dim": 16, "pooled_projection_dim": 8,
        "pos_embed_max_size": 8, "dual_attention_layers": (0,)}),
    Tiny("lumina2", "Lumina2Transformer2DModel", "Lumina2LoraLoaderMixin", {
        "sample_size": 8, "in_channels": 4, "hidden_size": 24, "num_layers": 2, "cap_feat_dim": 8,
        "num_refiner_layers": 1, "num_attention_heads": 3, "num_kv_heads": 1, "multiple_of": 8,
        "axes_dim_rope": (2, 2, 4), "axes_lens": (8, 8, 8)}),
    Tiny("krea2", "Krea2Transformer2DModel", "Krea2LoraLoaderMixin", {
        "in_channels": 4, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 4,
        "num_key_value_heads": 1, "intermediate_size": 24, "timestep_embed_dim": 8,
        "text_hidden_dim": 16, "num_text_layers": 2, "text_num_attention_heads": 2,
        "text_num_key_value_heads": 2, "text_intermediate_size": 24,
        "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1, "axes_dims_rope": (2, 2, 4)}),
    Tiny("anima", "CosmosTransformer3DModel", "AnimaLoraLoaderMixin", {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4,
        "num_layers": 2, "text_embed_dim": 16, "adaln_lora_dim": 8, "max_size": (4, 8, 8),
        "extra_pos_embed_type": None}),
    Tiny("ltx_video", "LTXVideoTransformer3DModel", "LTXVideoLoraLoaderMixin", {
        **HEADS, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 16, "num_layers": 2,
        "caption_channels": 8}),
    Tiny("ltx2", "LTX2VideoTransformer3DModel", "LTX2LoraLoaderMixin", {
        **HEADS, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 16, "num_layers": 2,
        "caption_channels": 8, "audio_in_channels": 4, "audio_out_channels": 4,
        "audio_num_attention_heads": 2, "audio_attention_head_dim": 4,
        "audio_cross_attention_dim": 8}),
    Tiny("hidream_i1", "HiDreamImageTransformer2DModel", "HiDreamImageLoraLoaderMixin", {
        **HEADS, "patch_size": 2, "in_channels": 4, "num_layers": 2, "num_single_layers": 2,
        "caption_channels": [8, 8], "text_emb_dim": 8, "axes_dims_rope": (4, 4),
        "max_resolution": (8, 8), "llama_layers": [0, 1]}),
    Tiny("auraflow", "AuraFlowTransformer2DModel", "AuraFlowLoraLoaderMixin", {
        **HEADS, "sample_size": 8, "in_channels": 4, "num_mmdit_layers": 2,
        "num_single_dit_layers": 2, "joint_attention_dim": 8, "caption_projection_dim": 16,
        "out_channels": 4, "pos_embed_max_size": 16}),
    Tiny("mochi", "MochiTransformer3DModel", "Mochi1LoraLoaderMixin", {
        **HEADS, "num_layers": 2, "pooled_projection_dim": 8, "in_channels": 4,
        "text_embed_dim": 8, "time_embed_dim": 8}),
    Tiny("cogview", "CogView4Transformer2DModel", "CogView4LoraLoaderMixin", {
        **HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "text_embed_dim": 16,
        "time_embed_dim": 8, "condition_dim": 8, "pos_embed_max_size": 8, "sample_size": 8,
        "rope_axes_dim": (4, 4)}),
    Tiny("cogvideox", "CogVideoXTransformer3DModel", "CogVideoXLoraLoaderMixin", {
        **HEADS, "in_channels": 4, "out_channels": 4, "time_embed_dim": 8, "text_embed_dim": 8,
        "num_layers": 2, "sample_width": 8, "sample_height": 8, "sample_frames": 5}),
    Tiny("kandinsky5", "Kandinsky5Transformer3DModel", "KandinskyLoraLoaderMixin", {
        "in_text_dim": 8, "in_text_dim2": 8, "time_dim": 8, "model_dim": 16, "ff_dim": 24,
        "num_text_blocks": 1, "num_visual_blocks": 2, "axes_dims": (2, 2, 4)}),
    Tiny("ideogram4", "Ideogram4Transformer2DModel", "Ideogram4LoraLoaderMixin", {
        **HEADS, "in_channels": 4, "num_layers": 2, "intermediate_size": 24, "adaln_dim": 8,
        "llm_features_dim": 8, "mrope_section": (2, 1, 1)}),
    Tiny("ernie_image", "ErnieImageTransformer2DModel", "ErnieImageLoraLoaderMixin", {
        "hidden_size": 16, "num_attention_heads": 2, "num_layers": 2, "ffn_hidden_size": 24,
        "in_channels": 4, "out_channels": 4, "text_in_dim": 8, "rope_axes_dim": (2, 2, 4)}),
    Tiny("ace_step", "AceStepTransformer1DModel", "AceStepLoraLoaderMixin", {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "in_channels": 12,
        "audio_acoustic_hidden_dim": 4}),
    Tiny("minimax_h3", "MiniMaxH3Transformer3DModel", "MiniMaxH3LoraLoaderMixin", {
        **HEADS, "hidden_size": 12, "num_layers": 2, "num_refiner_layers": 1, "ffn_dim": 24,
        "in_channels": 4, "audio_in_channels": 4, "text_dim": 8, "freq_dim": 8,
        "time_embed_hidden_dim": 12, "time_embed_dim": 8, "rope_freq_dim": 2}),
)  # fmt: skip


def made(tiny: Tiny) -> Any:
    """The model; skipped where there is no diffusers."""
    diffusers = pytest.importorskip("diffusers")
    return getattr(diffusers, tiny.model)(**tiny.sizes)


def original_modules(tiny: Tiny, model: Any) -> dict[str, tuple[int, int]]:
    """Every linear module that the family's map has, as files name it -> its shape."""
    found: dict[str, list[int]] = {}
    naming = families()[tiny.family].flat
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        for place in places("unet", name, family=tiny.family)[:1]:
            (original,) = place.names(naming if naming in place.namings else "original")
            shape = found.setdefault(original, [0, module.in_features])
            shape[0] += module.out_features
    return {name: (rows, columns) for name, (rows, columns) in found.items()}


def write(path: Path, shapes: Mapping[str, tuple[int, int]], prefix: str, seed: int) -> None:
    """A file of LoRA with ranks and alphas of their own."""
    torch.manual_seed(seed)
    tensors = {}
    flat = prefix.endswith("_")
    for number, (name, (rows, columns)) in enumerate(shapes.items()):
        rank = 2 + number % 2
        stem = prefix + (name.replace(".", "_") if flat else name)
        down, up = ("lora_down", "lora_up") if flat else ("lora_A", "lora_B")
        tensors[f"{stem}.{down}.weight"] = torch.randn(rank, columns)
        tensors[f"{stem}.{up}.weight"] = torch.randn(rows, rank)
        tensors[f"{stem}.alpha"] = torch.tensor(1.0 + number % 3)
    save_file(tensors, str(path))


def converted(source: Path, out: Path) -> Path:
    lt.convert([source], program="diffusers", output=out)
    return out


def fixed(source: Path, out: Path) -> Path:
    """The file that `check --fix` wrote; itself, where it says that it loads as it is."""
    report = lt.check(source, program="diffusers", fix=True, output=out)
    assert out.exists() or report.verdict == "yes"
    return out if out.exists() else source


@pytest.mark.parametrize("make", [converted, fixed])
@pytest.mark.parametrize("prefix", ["lora_unet_", "diffusion_model."])
@pytest.mark.parametrize("tiny", TINY, ids=[t.model for t in TINY])
def test_it_is_the_same_change_there(tiny: Tiny, prefix: str, make: Any, tmp_path: Path) -> None:
    if tiny.family == "lumina2" and make is fixed:
        pytest.skip("its converter cuts by the width of the real model")
    model, base = made(tiny), tmp_path / "base.safetensors"
    zeroed(model, base)
    shapes = original_modules(tiny, model)
    source = tmp_path / "style.safetensors"
    write(source, shapes, prefix, seed=1)
    out = make(source, tmp_path / "out.safetensors")
    check(in_diffusers(model, tiny.loader, out), source, base, tmp_path)
