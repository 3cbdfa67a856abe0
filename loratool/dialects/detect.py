"""What each dialect looks like from outside: file names, configuration fields, tensor names."""

from __future__ import annotations

import re

from loratool.dialects.base import Candidate

_LORA_KEY = r"(^|\.)lora_(A|B|embedding_A|embedding_B)(\.[^.]+)*$"
_DIFFUSERS_PREFIX = r"^(unet|text_encoder(_2|_3)?|text_encoders|prior|connectors)\."
# Modules that only diffusion transformers have; GPT-2 and MPT also begin with "transformer.".
_DIFFUSION_BLOCK = r"(^|\.)(single_)?transformer_blocks\.|\.(to_q|to_k|to_v|to_out|add_q_proj)\."


def is_gguf(candidate: Candidate) -> bool:
    """A GGUF file, adapter or model."""
    return candidate.head[:4] == b"GGUF" or candidate.path.suffix == ".gguf"


def is_peft_folder(candidate: Candidate) -> bool:
    """``adapter_config.json`` with ``peft_type``, which PEFT itself requires."""
    return candidate.config is not None and "peft_type" in candidate.config


def is_mlx(candidate: Candidate) -> bool:
    """mlx-lm's configuration, or its keys: ``.lora_a`` without ``.weight``."""
    config = candidate.config or {}
    return (
        "lora_parameters" in config
        or "fine_tune_type" in config
        or candidate.has_key(r"\.lora_[ab]$")
    )


def is_litgpt(candidate: Candidate) -> bool:
    """The pickle of litgpt, by name."""
    return "lit_model.pth.lora" in candidate.names


def is_torchtune(candidate: Candidate) -> bool:
    """Own names of torchtune: ``layers.N.attn.q_proj.lora_a.weight``."""
    return candidate.has_key(r"(^|\.)layers\.\d+\..*\.lora_[ab]\.weight$")


def is_megatron(candidate: Candidate) -> bool:
    """NeMo and Megatron."""
    return candidate.has_key(r"adapter_layer\.lora_.*\.linear_(in|out)\.weight$")


def is_xlabs(candidate: Candidate) -> bool:
    """XLabs' FLUX processors."""
    return candidate.has_key(r"blocks\.\d+\.processor\.(qkv|proj)_lora[12]?\.(down|up)\.weight$")


def is_lycoris(candidate: Candidate) -> bool:
    """LyCORIS algorithms, in kohya's or its own prefix."""
    pattern = r"\.(hada_w1_a|lokr_w1|lokr_w1_a|oft_blocks|boft_blocks|a1\.weight|on_input|w_norm)$"
    is_flat = candidate.has_key(r"^lora_(unet|te\d?|prior_\w+)_")
    if is_flat and candidate.has_key(r"\.diff(_b)?$"):
        return True
    return candidate.has_key(r"^lycoris_") or candidate.has_key(pattern)


def is_kohya(candidate: Candidate) -> bool:
    """Flat names of kohya with ``lora_down``/``lora_up`` (also OneTrainer and musubi)."""
    return candidate.has_key(r"^lora_(unet|te\d?|prior_unet|prior_te|transformer)_") or (
        candidate.has_key(r"\.lora_down\.weight$") and not candidate.has_key(r"^diffusion_model\.")
    )


def is_comfyui(candidate: Candidate) -> bool:
    """ComfyUI's generic form: original names below ``diffusion_model.``."""
    return candidate.has_key(r"^diffusion_model\..*(lora_|hada_|lokr_|\.diff)")


def is_diffusers(candidate: Candidate) -> bool:
    """Pipelines of diffusers: ``unet.``, ``text_encoder.`` or a diffusion transformer."""
    old = candidate.has_key(r"(\.lora|_lora|lora_linear_layer)\.(down|up)\.weight$")
    if old or "lora_adapter_metadata" in (candidate.header.metadata if candidate.header else {}):
        return True
    if not candidate.has_key(r"\.lora_[AB](\.[^.]+)?\.weight$") or is_peft_prefixed(candidate):
        return False
    return candidate.has_key(_DIFFUSERS_PREFIX) or candidate.has_key(_DIFFUSION_BLOCK)


def is_control_lora(candidate: Candidate) -> bool:
    """Stability's Control-LoRA."""
    return "lora_controlnet" in candidate.keys


def is_textual_inversion(candidate: Candidate) -> bool:
    """Learned embeddings, no adapter."""
    keys = set(candidate.keys)
    return bool(keys & {"emb_params", "string_to_param"}) or (
        bool(keys) and keys <= {"clip_l", "clip_g", "t5xxl"}
    )


def is_peft_prefixed(candidate: Candidate) -> bool:
    """Tensor names of PEFT: the prefix at the front, or inside after a wrapper's name."""
    return candidate.has_key(r"(^|\.)base_model\.model\.")


def is_peft_file(candidate: Candidate) -> bool:
    """PEFT's tensor names in a file without configuration, with or without the prefix."""
    return is_peft_prefixed(candidate) or (
        candidate.config is None and candidate.has_key(_LORA_KEY)
    )


def peft_method(candidate: Candidate) -> str | None:
    """The method that the keys of a file without configuration show, None for LoRA."""
    for pattern, method in (
        (r"\.lora_E(\.[^.]+)?$", "ADALORA"),
        (r"vera_lambda_[bd]", "VERA"),
        (r"\.hada_w1_a", "LOHA"),
        (r"\.lokr_w[12]", "LOKR"),
        (r"\.ia3_l", "IA3"),
        (r"\.(oft_R|oft_r)\b", "OFT"),
        (r"\.boft_R", "BOFT"),
        (r"\.hra_u", "HRA"),
        (r"\.miss_block", "MISS"),
        (r"\.bone_block", "BONE"),
        (r"\.hira_[AB]", "HIRA"),
        (r"\.vblora_logits", "VBLORA"),
        (r"\.randlora_lambda", "RANDLORA"),
        (r"\.fourierft_spectrum", "FOURIERFT"),
        (r"\.delora_[AB]", "DELORA"),
        (r"\.shira_weight", "SHIRA"),
        (r"\.c3a_kernel", "C3A"),
        (r"\.ln_tuning_layers", "LN_TUNING"),
        (r"^prompt_embeddings$", "PROMPT_TUNING"),
    ):
        if candidate.has_key(pattern):
            return method
    return None


def gguf_kind(candidate: Candidate) -> str:
    """``adapter`` or ``model``: the value of ``general.type``."""
    found = re.search(rb"general\.type.{12}(\w+)", candidate.head, re.DOTALL)
    kind = b"" if found is None else found[1]
    return "adapter" if kind.startswith(b"adapter") else "model"
