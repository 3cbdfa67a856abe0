"""kohya: sd-scripts, musubi-tuner, OneTrainer's flat form; LyCORIS' algorithms under its prefixes.

``lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight``: the prefix is the part of the
pipeline, the rest the module with every dot an underscore.
"""

from __future__ import annotations

from loratool.dialects.base import Dialect, by_keys
from loratool.dialects.factors import OPEN_LENGTHS
from loratool.dialects.fields import Component, Field
from loratool.dialects.table import Table

MIXED = r"^lora_transformer_[^.]+\.\d+\."
"""OneTrainer's names of 2025, flat up to the first dot only."""

HASHES = r"sshs_(model|legacy)_hash|modelspec\.hash_sha256"
"""Keys of metadata that speak of the very tensors."""

TABLE = Table(
    components=(
        Component("lora_unet_", "unet"),
        Component("Hunyuan_video_I2V_lora_", "unet"),
        Component("lora_te_", "te"),
        Component("lora_te1_", "te1"),
        Component("lora_te2_", "te2"),
        Component("lora_te3_", "te3"),
        Component("lora_transformer_", "transformer"),
        Component("lora_prior_unet_", "prior_unet"),
        Component("lora_prior_te_", "prior_te"),
    ),
    fields=(
        Field("lora_down.weight", "lora_A"),
        Field("lora_up.weight", "lora_B"),
        Field("lora_mid.weight", "lora_mid"),
        Field("dora_scale", OPEN_LENGTHS),
        Field("diff", "full_delta", kind="full"),
        Field("set_weight", "", is_set=True),
        Field("w_norm", "delta", kind="vector", is_norm=True),
        Field("b_norm", "delta", kind="vector", parameter="bias", is_norm=True),
        Field("diff_b", "delta", kind="vector", parameter="bias"),
        Field("oft_blocks", "oft_blocks"),
        Field("rescale", "oft_rescale"),
        Field("weight", "ia3_gate"),
        Field("on_input", "on_input"),
        *(Field(f"{name}.weight", f"glora_{name}") for name in ("a1", "a2", "b1", "b2")),
        Field("q_layer.weight", "lora_A", start="tlora"),
        Field("p_layer.weight", "lora_B", start="tlora"),
        Field("lambda_layer", "diag", start="tlora"),
    ),
    factor="scalar",  # LyCORIS before it folded it into a factor
    grows="reshape_weight",
    passed=r"bundle_emb\.",
    unreadable=(
        "ss_network_args",
        r'"sig_type": *"(?!principal")|"use_data_init": *"?[Ff]alse',
        "T-LoRA that did not start from the largest singular vectors of the base",
    ),
    # What diffusers states of ranks and alphas it would believe of these files too.
    stale=rf"{HASHES}|lora_adapter_metadata",
    ranks=("ss_network_dim", "ss_network_alpha"),
    model="ss_base_model_version",
)

ROW = Dialect(
    "kohya", "kohya",
    by_keys(r"^(lora_(unet|te\d?|prior_unet|prior_te|transformer)|Hunyuan_video_I2V_lora)_",
            unless=(MIXED,)), TABLE,
    library="diffusers",
)  # fmt: skip
