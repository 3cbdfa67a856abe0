"""A failing and a passing file for every rule of the programs of image models: names and shapes."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from loratool.dialects.programs import find_program

Shapes = dict[str, tuple[int, ...]]


class Sample(NamedTuple):
    """One row of the table.

    Attributes:
        program: name of the program.
        rule: name of the rule.
        verdict: of the modules that it is about.
        bad: tensors of a file that it applies to.
        good: tensors of a file that differs in that alone.
        metadata: of the failing file.
    """

    program: str
    rule: str
    verdict: str
    bad: Shapes
    good: Shapes
    metadata: Mapping[str, str] = MappingProxyType({})


def pair(stem: str, out: int = 8, inner: int = 8, rank: int = 2, how: str = "down") -> Shapes:
    """The tensors of one plain LoRA: ``down`` with alpha, ``A`` without, ``A+`` with."""
    a, b = ("lora_down", "lora_up") if how == "down" else ("lora_A", "lora_B")
    found: Shapes = {f"{stem}.{a}.weight": (rank, inner), f"{stem}.{b}.weight": (out, rank)}
    return found if how == "A" else {**found, f"{stem}.alpha": ()}


def without(tensors: Shapes, end: str) -> Shapes:
    """The same less the tensors that end so."""
    return {k: v for k, v in tensors.items() if not k.endswith(end)}


SD = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
LANGUAGE = "lora_unet_model_layers_0_self_attn_q_proj"
SGM = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
TE = "lora_te_text_model_encoder_layers_0_mlp_fc1"
FLUX = "lora_unet_double_blocks_0_img_attn_proj"
FLUX_DOTTED = "diffusion_model.double_blocks.0.img_attn.proj"
FLUX_OWN = "transformer.single_transformer_blocks.0.attn.to_q"
HUNYUAN_OWN = "transformer.context_embedder.token_refiner.refiner_blocks.0.attn.to_q"
FLUX_OUT = "transformer.transformer_blocks.0.attn.to_add_out"
FLUX_MOD = "transformer.transformer_blocks.0.norm1_context.linear"
PIXART = "transformer.transformer_blocks.0.ff.net.0.proj"
FLUX3 = "diffusion_model.single_blocks.0.q_proj"
FLUX2 = "single_blocks.0.linear1"
WAN_OWN = "transformer.blocks.0.attn1.to_q"
WAN = "diffusion_model.blocks.0.self_attn.q"
Z_IMAGE = "diffusion_model.layers.0.attention.to_q"
QWEN = "transformer_blocks.0.img_mlp.net.2"
KREA = "diffusion_model.blocks.0.attn.wq"
ANIMA = "diffusion_model.blocks.0.self_attn.q_proj"
LAYER = "lora_te_text_model_encoder_layers_0"
attention = {**pair(f"{LAYER}_self_attn_q_proj"), **pair(f"{LAYER}_self_attn_k_proj"),
             **pair(f"{LAYER}_self_attn_out_proj")}  # fmt: skip
OWN_LAYER = "text_encoder.text_model.encoder.layers.0"
MOCHI = "transformer.transformer_blocks"
mochi = {**pair(f"{MOCHI}.0.attn1.to_q", how="A"),
         **pair(f"{MOCHI}.0.norm1_context.linear", 16, 8, how="A")}  # fmt: skip
sd, flux = pair(SD), pair(FLUX)
# to_add_out alone may be of several models.
flux_modulation = pair("transformer.single_transformer_blocks.0.norm.linear", 24, how="A")
flux_out = {**flux_modulation, **pair(FLUX_OUT, how="A")}
flux_single = pair(FLUX_OWN.replace("attn.to_q", "proj_out"), 8, 40, how="A")
embedding: Shapes = {"bundle_emb.cat.string_to_param.*": (2, 8)}
loha: Shapes = {
    f"{SD}.{end}": shape for end, shape in {
        "hada_w1_a": (8, 2), "hada_w1_b": (2, 8), "hada_w2_a": (8, 2), "hada_w2_b": (2, 8),
        "alpha": (),
    }.items()
}  # fmt: skip
oft: Shapes = {f"{SD}.oft_blocks": (2, 4, 4), f"{SD}.alpha": ()}
boft: Shapes = {f"{SD}.oft_blocks": (2, 2, 4, 4), f"{SD}.alpha": ()}
lokr: Shapes = {f"{CONV}.lokr_w1": (2, 2), f"{CONV}.lokr_w2": (4, 4, 3, 3), f"{CONV}.alpha": ()}
lokr_core: Shapes = {
    f"{CONV}.lokr_w1": (2, 2), f"{CONV}.lokr_t2": (2, 2, 3, 3), f"{CONV}.lokr_w2_a": (2, 4),
    f"{CONV}.lokr_w2_b": (2, 4), f"{CONV}.alpha": (),
}  # fmt: skip
unet = pair("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", how="A")
unet_ff = pair("unet.down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2", how="A")
flux2 = pair(f"diffusion_model.{FLUX2}", 72, 8, how="A")
flux2_kohya = pair("lora_unet_single_blocks_0_linear1", 72, 8)
wan_block: Shapes = {}
for leaf in (*(f"{a}_attn_{p}" for a in ("self", "cross") for p in "qkvo"), "ffn_0", "ffn_2"):
    wan_block |= pair(f"lora_unet_blocks_0_{leaf}")
lumina: Shapes = {}
for leaf in ("attention.qkv", "attention.out", *(f"feed_forward.w{i}" for i in (1, 2, 3))):
    lumina |= pair(f"diffusion_model.layers.0.{leaf}", 12 if "qkv" in leaf else 8, how="A")
control: Shapes = {"double_blocks.0.img_attn.norm.query_norm.scale": (4,)}
for name in ("img_in", "txt_in", "time_in.in_layer", "final_layer.linear",
             *(f"double_blocks.{i}.img_attn.qkv" for i in range(19)),
             *(f"single_blocks.{i}.linear1" for i in range(38))):  # fmt: skip
    control |= pair(name, 7 * 8 if "linear1" in name else 8, how="A")

SD_DOTTED = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q"
SD3_FLAT = "lora_unet_joint_blocks_0_x_block_attn_qkv"
SD3 = "transformer.transformer_blocks.0.attn.to_q"
upsampler = pair("lora_unet_up_blocks_0_upsamplers_0_conv")
sd3_attention: Shapes = {}
for leaf in ("to_q", "to_k", "to_v", "to_out.0"):
    sd3_attention |= pair(SD3.replace("to_q", leaf), 1536, 1536, how="A")
open_clip: Shapes = {}
for leaf in "qkv":
    open_clip |= pair(f"lora_te2_text_model_encoder_layers_0_self_attn_{leaf}_proj")
open_clip |= pair("lora_te2_text_model_encoder_layers_0_self_attn_out_proj")
glora: Shapes = {
    f"{SD}.a1.weight": (8, 2), f"{SD}.a2.weight": (2, 8), f"{SD}.b1.weight": (8, 2),
    f"{SD}.b2.weight": (2, 8), f"{SD}.alpha": (),
}  # fmt: skip
old_glora = {k: v[::-1] for k, v in glora.items()}
ideogram = pair("diffusion_model.layers.0.attention.qkv", 24, how="A")
ideogram |= pair("diffusion_model.layers.0.attention.o", how="A")
META = {"lora_adapter_metadata": '{"transformer.r": 2, "transformer.lora_alpha": 8}'}
SAMPLES = (
    # ------------------------------------------------------------------------------- ComfyUI
    Sample("comfyui", "boft-alpha", "dropped", without(boft, "alpha"), boft),
    Sample("comfyui", "peft-unet", "dropped", unet, unet_ff),
    Sample("comfyui", "text-model", "dropped", pair(TE.replace("text_model_", "")), pair(TE)),
    Sample("comfyui", "unknown-name", "dropped", pair("lora_unet_layers_0_attention_to_q"),
           pair("lora_unet_layers_0_attention_qkv", 24)),
    Sample("comfyui", "unknown-end", "dropped", {**sd, f"{SD}.strange": (8,)}, sd),
    Sample("comfyui", "diff-m", "dropped", {**pair(WAN),
           "diffusion_model.blocks.0.diff_m": (1, 6, 8)}, {**pair(WAN),
           "diffusion_model.blocks.0.modulation.diff": (1, 6, 8)}),
    Sample("comfyui", "bundle-emb", "dropped", {**sd, **embedding}, sd),
    Sample("comfyui", "ia3", "dropped", {f"{SD}.weight": (8,), f"{SD}.on_input": ()}, sd),
    Sample("comfyui", "t-lora", "dropped", {
        f"{SD}.q_layer.weight": (2, 8), f"{SD}.p_layer.weight": (8, 2),
        f"{SD}.lambda_layer": (1, 2), f"{SD}.alpha": ()}, sd),
    Sample("comfyui", "oft-of-peft", "dropped", {f"{SD}.oft_R.weight": (2, 6)}, oft),
    Sample("comfyui", "left-alone", "raises", without(flux, "lora_down.weight"), flux),
    Sample("comfyui", "one-factor", "dropped", without(flux, "lora_up.weight"), flux),
    Sample("comfyui", "lokr-core", "dropped", lokr_core, lokr),
    Sample("comfyui", "dora-1d", "dropped", {**sd, f"{SD}.dora_scale": (8,)},
           {**sd, f"{SD}.dora_scale": (1, 8)}),
    Sample("comfyui", "twice", "dropped", {**pair(FLUX_DOTTED, how="A"), **flux}, flux),
    Sample("comfyui", "twice", "dropped", {**pair(TE.replace("te", "te1", 1)), **pair(TE)},
           {**pair(TE.replace("te", "te1", 1)), **pair(TE.replace("te", "te2", 1))}),
    Sample("comfyui", "magnitude", "wrong", {**pair(FLUX_DOTTED, how="A"),
           f"{FLUX_DOTTED}.magnitude": (8,)}, pair(FLUX_DOTTED, how="A")),
    Sample("comfyui", "dora-rows", "wrong", {**sd, f"{SD}.dora_scale": (8, 1)},
           {**sd, f"{SD}.dora_scale": (1, 8)}),
    Sample("comfyui", "oft-rescale", "wrong", {**oft, f"{SD}.rescale": (8, 1)}, oft),
    Sample("comfyui", "metadata-scale", "wrong", pair(FLUX_OWN, how="A"),
           pair(FLUX_OWN, how="A+"), META),
    Sample("comfyui", "header-alpha", "wrong", pair("lora_unet_blocks_0_attn_qkv_proj", how="A"),
           pair("lora_unet_blocks_0_attn_qkv_proj"), {"alpha": "4"}),
    Sample("comfyui", "fused-and-split", "wrong",
           {**pair("diffusion_model.layers.0.attention.qkv", 24), **pair(Z_IMAGE)}, pair(Z_IMAGE)),
    Sample("comfyui", "boft-constraint", "unsure", boft, oft),
    Sample("comfyui", "wide-input", "unsure",
           {**pair(FLUX_OWN, how="A"), **pair("transformer.x_embedder", 8, 128, how="A")},
           {**pair(FLUX_OWN, how="A"), **pair("transformer.x_embedder", 8, 64, how="A")}),
    Sample("comfyui", "unknown-model", "unsure", pair("lycoris_lin_a"), sd),
    # --------------------------------------------------------------------------------- Forge
    Sample("forge", "version-mismatch", "dropped",
           {**sd, **{f"bundle_emb.cat.{i}": (2, 8) for i in range(13)}},
           {**sd, **{f"bundle_emb.cat.{i}": (2, 8) for i in range(12)}}),
    Sample("forge", "unmatched", "dropped", {**sd, **embedding}, sd),
    Sample("forge", "dora-of-peft", "wrong", {**pair(FLUX_OWN, how="A"),
           f"{FLUX_OWN}.lora_magnitude_vector": (8,)}, pair(FLUX_OWN, how="A")),
    Sample("forge", "unknown-model", "unsure", pair(WAN), flux),
    Sample("forge", "language-model", "dropped", pair(LANGUAGE), pair("lora_unet_lin_a")),
    # --------------------------------------------------------------------------------- webui
    Sample("webui", "no-algorithm", "raises", {f"{SD}.oft_R.weight": (2, 6)}, oft),
    Sample("webui", "model-itself", "raises", pair(SD_DOTTED, how="A"), sd),
    Sample("webui", "sd3-short", "raises", pair(SD3_FLAT), without(pair(SD3_FLAT), "alpha")),
    Sample("webui", "bundle", "raises", {**sd, "bundle_emb.cat.clip_l": (2, 8),
           "bundle_emb.cat.t5": (2, 8)}, {**sd, "bundle_emb.cat.clip_l": (2, 8),
           "bundle_emb.cat.clip_g": (2, 8)}),
    Sample("webui", "other-model", "dropped", flux, sd),
    Sample("webui", "dotted", "dropped", unet, sd),
    Sample("webui", "text-model", "dropped", pair(TE.replace("text_model_", "")), pair(TE)),
    Sample("webui", "unknown-name", "dropped",
           {**sd, **pair("lora_unet_add_embedding_linear_1")}, {**sd, **pair(TE)}),
    Sample("webui", "xl-upsampler", "dropped", {
        **pair(SD.replace("transformer_blocks_0", "transformer_blocks_1")), **upsampler},
           upsampler),
    Sample("webui", "text-attention", "dropped", {
        k: v for k, v in open_clip.items() if "out_proj" not in k}, open_clip),
    Sample("webui", "sd3-text", "dropped", {**sd3_attention, **pair(
        "text_encoder.text_model.encoder.layers.0.mlp.fc1", how="A")}, sd3_attention),
    Sample("webui", "sd3-names", "dropped", {**sd3_attention, **pair(
        SD3.replace("to_q", "add_q_proj"), 1536, 1536, how="A")}, sd3_attention),
    Sample("webui", "sd3-alpha", "dropped", {**sd3_attention, f"{SD3}.alpha": ()}, sd3_attention),
    Sample("webui", "sd3-attention", "dropped", pair(SD3, 1536, 1536, how="A"), sd3_attention),
    Sample("webui", "unread", "dropped", {**sd, f"{SD}.diff_b": (8,)},
           {f"{SD}.diff": (8, 8), f"{SD}.diff_b": (8,)}),
    Sample("webui", "glora", "dropped", glora, old_glora),
    Sample("webui", "dora-1d", "dropped", {**pair(SD, out=6), f"{SD}.dora_scale": (6,)},
           {**sd, f"{SD}.dora_scale": (1, 8)}),
    Sample("webui", "letters-alpha", "wrong", pair(SD, how="A+"), pair(SD, how="A")),
    Sample("webui", "letters-dora", "wrong", {**pair(SD, how="A"), f"{SD}.dora_scale": (1, 8)},
           {**sd, f"{SD}.dora_scale": (1, 8)}),
    Sample("webui", "glora-scale", "wrong", old_glora, sd),
    Sample("webui", "dora-rows", "wrong", {**sd, f"{SD}.dora_scale": (8, 1)},
           {**sd, f"{SD}.dora_scale": (1, 8)}),
    Sample("webui", "ia3-conv", "unsure", {f"{CONV}.weight": (1, 8, 1, 1), f"{CONV}.on_input": ()},
           {f"{SD}.weight": (8,), f"{SD}.on_input": ()}),
    Sample("webui", "unknown-model", "unsure", pair("lora_unet_lin_a"), sd),
    Sample("webui", "language-model", "dropped", pair(LANGUAGE), pair("lora_unet_lin_a")),
    # ------------------------------------------------------------------------------ nunchaku
    Sample("nunchaku", "other-model", "raises", sd, flux),
    Sample("nunchaku", "other-model", "raises", flux2_kohya, flux),
    Sample("nunchaku", "text-left", "raises",
           {**flux_out, **pair(f"{OWN_LAYER}.mlp.fc1", how="A")}, flux_out),
    Sample("nunchaku", "text", "dropped", {**flux, **pair(TE.replace("te", "te1", 1))}, flux),
    Sample("nunchaku", "names", "raises", pair(FLUX_DOTTED, how="A"), pair(FLUX_DOTTED)),
    Sample("nunchaku", "lost-names", "dropped",
           pair("base_model.model.double_blocks.0.img_attn.proj", how="A"), flux),
    Sample("nunchaku", "lost-names", "dropped",
           pair("lycoris_single_transformer_blocks_0_proj_mlp"), flux_out),
    Sample("nunchaku", "lost-names", "dropped",
           {k.replace(".weight", ".default.weight"): v for k, v in flux_out.items()}, flux_out),
    Sample("nunchaku", "lost-names", "dropped",
           pair("double_blocks.0.img_attn.proj", how="A"), flux_out),
    Sample("nunchaku", "algorithm", "raises", {k.replace(SD, FLUX): v for k, v in loha.items()},
           flux),
    Sample("nunchaku", "full", "dropped", {**flux, f"{FLUX}.diff": (8, 8)}, flux),
    Sample("nunchaku", "one-factor", "raises", without(flux, "lora_up.weight"), flux),
    Sample("nunchaku", "partner", "raises", pair("lora_unet_double_blocks_0_img_mlp_0", 32),
           pair("lora_unet_double_blocks_0_img_mlp_2", inner=32)),
    Sample("nunchaku", "partner", "raises", flux_single,
           {**flux_single, **pair(FLUX_OWN.replace("attn.to_q", "proj_mlp"), 32, how="A")}),
    Sample("nunchaku", "bias", "raises", {**flux_out, f"{FLUX_OUT}.lora_B.bias": (8,)},
           {**pair(f"{FLUX_MOD}", 48, how="A"), f"{FLUX_MOD}.lora_B.bias": (48,)}),
    Sample("nunchaku", "dora", "wrong", {**flux, f"{FLUX}.dora_scale": (8, 1)}, flux),
    Sample("nunchaku", "alpha", "wrong", {**flux_modulation, **pair(FLUX_OUT)},
           {**flux_modulation, **pair(FLUX_OUT, how="A+")}),
    Sample("nunchaku", "in-part", "unsure", pair(FLUX_OWN, how="A"),
           {k: v for x in "qkv" for k, v in pair(f"{FLUX_OWN[:-1]}{x}", how="A").items()}),
    Sample("nunchaku", "unknown-model", "unsure", pair("lycoris_lin_a"), flux),
    Sample("nunchaku", "language-model", "dropped", pair(LANGUAGE), pair("lora_unet_lin_a")),
    # ---------------------------------------------------------------------------- sd-scripts
    Sample("sd-scripts", "letters", "raises", unet, sd),
    Sample("sd-scripts", "algorithm", "dropped", loha, sd),
    Sample("sd-scripts", "core", "dropped", {
        f"{CONV}.lora_down.weight": (2, 8, 1, 1), f"{CONV}.lora_mid.weight": (2, 2, 3, 3),
        f"{CONV}.lora_up.weight": (8, 2, 1, 1), f"{CONV}.alpha": ()}, sd),
    Sample("sd-scripts", "dora", "wrong", {**sd, f"{SD}.dora_scale": (1, 8)}, sd),
    Sample("sd-scripts", "unknown-end", "dropped", {**sd, **embedding}, sd),
    Sample("sd-scripts", "unknown-model", "unsure", pair("lora_unet_lin_a"), sd),
    Sample("sd-scripts", "language-model", "dropped", pair(LANGUAGE), pair("lora_unet_lin_a")),
    # ----------------------------------------------------------------- diffusers: UNets, FLUX
    Sample("diffusers", "unknown-model", "unsure", pair("lora_unet_lin_a"), sd),
    Sample("diffusers", "unknown-model", "unsure", pair("lin_a", how="A"), unet),
    *(Sample("diffusers", "language-model", "dropped", pair(stem, how=how), unet)
      for stem, how in ((LANGUAGE, "down"), ("model.layers.0.mlp.up_proj", "A"),
                        ("transformer.model.layers.0.mlp.up_proj", "A"))),
    Sample("diffusers", "leftover", "raises", loha, sd),
    Sample("diffusers", "no-lora-in-name", "raises", {**sd, **embedding}, sd),
    Sample("diffusers", "sgm-beside-own", "dropped", {**sd, **pair(SGM)}, pair(SGM)),
    Sample("diffusers", "flux-top", "dropped", {**flux, **pair("lora_unet_img_in")}, flux),
    Sample("diffusers", "flux-depth", "raises", pair("lora_unet_double_blocks_19_img_attn_proj"),
           pair("lora_unet_double_blocks_18_img_attn_proj")),
    Sample("diffusers", "flux-left", "raises", {**flux,
           "lora_unet_double_blocks_0_txt_attn_proj.lokr_w1": (2, 2)}, flux),
    Sample("diffusers", "flux-te", "dropped", {**flux,
           **pair("lora_te3_encoder_block_0_layer_0_SelfAttention_q")},
           {**flux, **pair("lora_te1_text_model_encoder_layers_0_mlp_fc1")}),
    Sample("diffusers", "flux-biases", "dropped", {**flux, f"{FLUX}.diff_b": (8,)}, flux),
    Sample("diffusers", "flux-own-diff", "dropped", {**pair(FLUX_OWN, how="A"),
           f"{FLUX_OWN}.diff_b": (8,)}, {**pair(FLUX_OWN, how="A"),
           f"{FLUX_OWN}.lora_B.bias": (8,)}),
    Sample("diffusers", "flux-norms", "dropped", {**pair(FLUX_DOTTED),
           "diffusion_model.double_blocks.0.img_attn.norm.key_norm.diff": (4,)}, pair(FLUX_DOTTED)),
    Sample("diffusers", "flux-beside-transformer", "dropped", {**flux, **pair(FLUX_OWN)},
           pair(FLUX_OWN)),
    Sample("diffusers", "flux-beside-mixture", "dropped",
           {**flux, **pair("lora_transformer_single_transformer_blocks_0_attn_to_q")},
           pair("lora_transformer_single_transformer_blocks_0_attn_to_q")),
    Sample("diffusers", "flux-original", "dropped",
           pair("transformer.double_blocks.0.img_attn.proj"), pair(FLUX_DOTTED)),
    Sample("diffusers", "flux-embedding", "dropped", {**flux, **embedding}, flux),
    Sample("diffusers", "flux-int-alpha", "raises", pair(FLUX_OWN, how="A+"),
           pair(FLUX_OWN, how="A"), {"alpha is": "I64"}),
    Sample("diffusers", "flux-foreign", "dropped", pair(FLUX_DOTTED, how="A"),
           pair(FLUX_OWN, how="A")),
    Sample("diffusers", "control-partial", "raises", {k: v for k, v in control.items()
           if "double_blocks.18" not in k}, control),
    Sample("diffusers", "control-final", "wrong",
           {**control, **pair("final_layer.adaLN_modulation.1", how="A")}, control),
    Sample("diffusers", "flux2-top", "dropped", {**flux2_kohya,
           **pair("lora_unet_single_stream_modulation_lin")}, flux2_kohya),
    Sample("diffusers", "flux2-alpha", "raises", pair(f"diffusion_model.{FLUX2}", 72, how="A+"),
           flux2),
    Sample("diffusers", "flux2-algorithm", "raises", {**flux2,
           **{f"diffusion_model.double_blocks.0.img_attn.proj.hada_w{i}_{s}": (4, 4)
              for i in (1, 2) for s in "ab"}}, flux2),
    Sample("diffusers", "flux2-final", "wrong", {**flux2,
           **pair("diffusion_model.final_layer.adaLN_modulation.1", how="A")}, flux2),
    Sample("diffusers", "flux2-foreign", "dropped", pair(FLUX2, 72, how="A"), flux2),
    # ------------------------------------------------------------------- diffusers: the others
    Sample("diffusers", "algorithm", "raises", {**pair(WAN),
           **{f"diffusion_model.blocks.0.self_attn.k.hada_w{i}_{s}": (4, 4)
              for i in (1, 2) for s in "ab"}}, pair(WAN)),
    Sample("diffusers", "lokr", "raises", {**pair(WAN),
           "diffusion_model.blocks.0.self_attn.k.lokr_w1": (2, 2),
           "diffusion_model.blocks.0.self_attn.k.lokr_w2": (4, 4)}, pair(WAN)),
    Sample("diffusers", "full", "raises", {**pair(Z_IMAGE), f"{Z_IMAGE[:-1]}k.diff": (8, 8)},
           pair(Z_IMAGE)),
    Sample("diffusers", "own-diff", "raises", {**pair(WAN_OWN, how="A"),
           f"{WAN_OWN}.diff_b": (8,)}, {**pair(WAN_OWN, how="A"),
           f"{WAN_OWN}.lora_B.bias": (8,)}),
    Sample("diffusers", "lumina-numbered", "raises",
           {k.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): v
            for k, v in lumina.items()}, lumina),
    Sample("diffusers", "partial-lumina2", "raises", {k: v for k, v in lumina.items()
           if "w2" not in k}, lumina),
    Sample("diffusers", "partial-wan", "raises", {k: v for k, v in wan_block.items()
           if "ffn_2" not in k}, wan_block),
    Sample("diffusers", "wan-alpha", "raises",
           {**pair(WAN), **pair("diffusion_model.head.head")},
           {**pair(WAN), **without(pair("diffusion_model.head.head"), "alpha")}),
    Sample("diffusers", "two-spellings", "raises",
           {**pair(WAN), **pair("diffusion_model.blocks.0.ffn.0", how="A")},
           {**pair(WAN), **pair("diffusion_model.blocks.0.ffn.0")}),
    Sample("diffusers", "wan-no-alpha", "raises", without(wan_block, "ffn_2.alpha"), wan_block),
    Sample("diffusers", "wan-vace", "raises", {**pair(WAN),
           **pair("diffusion_model.vace_blocks.0.self_attn.q")}, pair(WAN)),
    Sample("diffusers", "wan-animate", "raises", {**pair(WAN), **pair(
           "diffusion_model.face_adapter.fuser_blocks.0.linear1_q")}, pair(WAN)),
    Sample("diffusers", "wan-diff", "dropped", {**pair(WAN),
           "diffusion_model.blocks.0.norm3.diff": (8,)}, pair(WAN)),
    Sample("diffusers", "krea-alpha", "raises", pair(KREA, how="A+"), pair(KREA, how="A")),
    Sample("diffusers", "krea-numbered", "raises", without(pair(KREA), "alpha"),
           pair(KREA, how="A")),
    Sample("diffusers", "alpha-left", "raises", pair(ANIMA, how="A+"), pair(ANIMA, how="A")),
    Sample("diffusers", "flux3-top", "dropped", {**pair(FLUX3, how="A"), **pair(
        "diffusion_model.txt_in", how="A")}, pair(FLUX3, how="A")),
    Sample("diffusers", "qwen21-names", "dropped",
           pair("lora_unet_transformer_blocks_0_img_mlp_gate_layer"),
           pair("lora_unet_transformer_blocks_0_img_mlp_proj")),
    Sample("diffusers", "no-loader", "unsure", pair(PIXART, 4608, 1152, how="A"),
           pair(PIXART, 4608, 2048, how="A")),
    Sample("diffusers", "ideogram-top", "raises", {
        **ideogram, **pair("diffusion_model.adaln_proj", how="A")}, ideogram),
    Sample("diffusers", "wan-left", "raises", {**wan_block, **pair("lora_unet_head_head")},
           wan_block),
    Sample("diffusers", "z-fused", "dropped", pair("diffusion_model.layers.0.attention.qkv", 24),
           pair("lora_unet_layers_0_attention_qkv", 24)),
    Sample("diffusers", "z-out", "dropped",
           {**pair(Z_IMAGE, how="A"), **pair("diffusion_model.layers.0.attention.out", how="A")},
           {**pair(Z_IMAGE), **pair("diffusion_model.layers.0.attention.out")}),
    Sample("diffusers", "z-double", "dropped", pair("lora_unet__layers_0_attention_to_q"),
           pair("lora_unet_layers_0_attention_to_q")),
    Sample("diffusers", "z-top", "dropped", {**pair(Z_IMAGE),
           **pair("diffusion_model.final_layer.linear")}, pair(Z_IMAGE)),
    Sample("diffusers", "doubled-prefix", "dropped", pair(f"transformer.{QWEN}", how="A+"),
           pair(f"transformer.{QWEN}", how="A")),
    Sample("diffusers", "mochi-last", "dropped",
           {**mochi, **pair(f"{MOCHI}.1.norm1_context.linear", 4, 8, how="A")},
           {**mochi, **pair(f"{MOCHI}.1.norm1_context.linear_1", 4, 8, how="A")}),
    Sample("diffusers", "flat-conv", "raises", {**sd, **pair(CONV, 8, 72)},
           {**sd, f"{CONV}.lora_down.weight": (2, 8, 3, 3),
            f"{CONV}.lora_up.weight": (8, 2, 1, 1)}),
    Sample("diffusers", "te-untold", "raises", pair(f"{LAYER}_self_attn_q_proj"),
           {**pair(f"{LAYER}_self_attn_q_proj"), **pair(f"{LAYER}_self_attn_out_proj")}),
    Sample("diffusers", "te-own-untold", "raises",
           {**unet, **pair(f"{OWN_LAYER}.mlp.fc1", how="A")},
           {**unet, **pair(f"{OWN_LAYER}.mlp.fc1", how="A"),
            **pair(f"{OWN_LAYER}.self_attn.v_proj", how="A")}),
    Sample("diffusers", "te-without-out", "dropped",
           {**pair(TE), **pair(f"{LAYER}_self_attn_q_proj")},
           {**pair(TE), **pair(f"{LAYER}_self_attn_q_proj"),
            **pair(f"{LAYER}_self_attn_out_proj")}),
    Sample("diffusers", "te-alphas", "wrong", attention, attention,
           {"odd alpha": "q_proj.alpha"}),
    Sample("diffusers", "te-projection", "raises",
           {**pair(TE), **pair("lora_te_text_projection", rank=3)},
           {**pair(TE), **pair("lora_te_text_projection")}),
    *(Sample("diffusers", "alpha-beside-own", "raises",
             {**pair(name, how="A"), f"{name}.alpha": ()}, pair(name, how="A"))
      for name in (WAN_OWN, HUNYUAN_OWN)),
    *(Sample("diffusers", "down-of-own", "raises", without(pair(name), "alpha"),
             pair(name, how="A"))
      for name in (WAN_OWN, f"transformer.{QWEN}", HUNYUAN_OWN)),
    Sample("diffusers", "own-left", "raises",
           pair(WAN_OWN.replace("transformer", "diffusion_model", 1), how="A"),
           pair(WAN_OWN, how="A")),
    Sample("diffusers", "own-lost", "dropped",
           pair("diffusion_model.transformer_blocks.0.norm1.linear_1", how="A"),
           pair("transformer.transformer_blocks.0.norm1.linear_1", how="A")),
    Sample("diffusers", "flux-own-left", "raises",
           pair(FLUX_OWN.replace("transformer.", "base_model.model.", 1), how="A"),
           pair(FLUX_OWN, how="A")),
    Sample("diffusers", "hunyuan-down", "raises",
           without(pair("diffusion_model.double_blocks.0.img_attn_qkv", 24), "alpha"),
           pair("diffusion_model.double_blocks.0.img_attn_qkv", 24, how="A")),
    Sample("diffusers", "hunyuan-refiner", "raises",
           {**pair("diffusion_model.double_blocks.0.img_attn_qkv", 24, how="A"), **pair(
               "diffusion_model.txt_in.individual_token_refiner.blocks.0.self_attn_qkv", 24,
               how="A")},
           pair("diffusion_model.double_blocks.0.img_attn_qkv", 24, how="A")),
    Sample("diffusers", "foreign", "dropped",
           pair("diffusion_model.double_blocks.0.img_attn_proj", how="A"),
           pair("diffusion_model.double_blocks.0.img_attn_qkv", 24, how="A")),
    Sample("diffusers", "hunyuan-final", "wrong",
           {**pair("diffusion_model.double_blocks.0.img_attn_qkv", 24, how="A"),
            **pair("diffusion_model.final_layer.adaLN_modulation.1", how="A")},
           pair("diffusion_model.double_blocks.0.img_attn_qkv", 24, how="A")),
    Sample("diffusers", "foreign", "dropped", pair(QWEN, how="A"), pair(f"transformer.{QWEN}",
           how="A")),
    Sample("diffusers", "one-factor", "raises", without(pair(FLUX_OWN, how="A"), "lora_B.weight"),
           pair(FLUX_OWN, how="A")),
    Sample("diffusers", "dora", "wrong", {**sd, f"{SD}.dora_scale": (8, 1)}, sd),
    Sample("diffusers", "magnitude", "wrong", {**pair(FLUX_OWN, how="A"),
           f"{FLUX_OWN}.magnitude": (8,)}, pair(FLUX_OWN, how="A")),
    # ------------------------------------------------------------- before the version of today
    Sample("diffusers", "lokr-old", "past", {f"{Z_IMAGE}.lokr_w1": (2, 2),
           f"{Z_IMAGE}.lokr_w2": (4, 4)}, pair(Z_IMAGE)),
    Sample("diffusers", "z-fused-kohya", "past", pair("lora_unet_layers_0_attention_qkv", 24),
           pair("lora_unet_layers_0_attention_to_q")),
    Sample("diffusers", "qwen-alpha", "past", pair(f"diffusion_model.{QWEN}", how="A+"),
           pair(f"diffusion_model.{QWEN}", how="A")),
    Sample("diffusers", "qwen-no-alpha", "past",
           without(pair(f"diffusion_model.{QWEN}"), "alpha"), pair(f"diffusion_model.{QWEN}")),
    Sample("diffusers", "mixed-ranks", "past", {**pair(FLUX_OWN, how="A"),
           **pair(FLUX_OWN[:-1] + "k", rank=4, how="A")}, pair(FLUX_OWN, how="A")),
)  # fmt: skip
# nunchaku calls diffusers' converter first.
SAMPLES += tuple(
    sample._replace(program="nunchaku") for sample in SAMPLES
    if sample.program == "diffusers"
    and sample.rule.startswith(("flux-", "control-"))
    and sample.rule in {rule.name for rule in find_program("nunchaku").rules}
)  # fmt: skip
