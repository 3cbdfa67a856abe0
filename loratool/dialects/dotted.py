"""Dialects of image models whose keys keep the dots of module names: what they share.

``transformer.transformer_blocks.0.attn.to_q.lora_A.weight``: the prefix is the part of the
pipeline, the rest the module in whatever naming, then what all of them may end in.  They differ in
prefixes, in what new files look like, and in where alpha stands.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import lru_cache

from loratool.archs.families import family_of
from loratool.dialects.base import Detector
from loratool.dialects.candidate import Candidate
from loratool.dialects.factors import LENGTHS, OPEN_LENGTHS
from loratool.dialects.fields import Component, Field
from loratool.dialects.kohya import HASHES as HASHES
from loratool.dialects.kohya import MIXED
from loratool.dialects.kohya import TABLE as KOHYA
from loratool.dialects.table import Table

_ROWS = LENGTHS[0]  # programs with these spellings know lengths of rows only
PEFT = (Field("lora_A.weight", "lora_A"), Field("lora_B.weight", "lora_B"))
DOWN = (Field("lora_down.weight", "lora_A"), Field("lora_up.weight", "lora_B"))
_OLD = (
    Field("lora.down.weight", "lora_A"), Field("lora.up.weight", "lora_B"),
    Field("lora_linear_layer.down.weight", "lora_A"),
    Field("lora_linear_layer.up.weight", "lora_B"),
    Field("lora_A", "lora_A"), Field("lora_B", "lora_B"),  # Mochi
)  # fmt: skip
BIAS = Field("lora_B.bias", "delta", kind="vector", parameter="bias", is_scaled=True)
LENGTHS_OF_PEFT = (
    Field("lora_magnitude_vector", _ROWS), Field("lora_magnitude_vector.weight", _ROWS),
    Field("magnitude", _ROWS),  # ai-toolkit
)  # fmt: skip
_SHARED = tuple(f for f in KOHYA.fields
                if f.start or f.role not in ("lora_A", "lora_B", OPEN_LENGTHS))  # fmt: skip
_ALL = (
    *_OLD, BIAS, Field("diff_m", "full_delta", kind="full", parameter="modulation"),
    Field("query_norm.scale", "", parameter="query_norm.scale", is_set=True),
    Field("key_norm.scale", "", parameter="key_norm.scale", is_set=True),
    *_SHARED,
)  # fmt: skip
FIELDS = (*PEFT, *DOWN, *LENGTHS_OF_PEFT, Field("dora_scale", OPEN_LENGTHS), *_ALL)
"""What keys end in anywhere; new files get the first spelling of a role."""
FIELDS_DOWN = (*DOWN, *PEFT, Field("dora_scale", OPEN_LENGTHS), *LENGTHS_OF_PEFT, *_ALL)
"""The same for programs that write ``lora_down``."""

ADAPTER_NAME = r"\.(?:lora_A|lora_B|lora_magnitude_vector)\.(?!weight$|bias$)([^.]+)(?=\.|$)"
RENAMES = (
    (r"\.(lora_A|lora_B|lora_magnitude_vector)\.(?!weight$|bias$)[^.]+(?=\.|$)", r".\1"),
    (r"^((?:transformer|unet)\.)?base_model\.model\.", r"\1"),  # PEFT over a part of a pipeline
    (r"(^|\.)sformer_blocks\.", r"\1transformer_blocks."),  # a damaged export of FLUX.2
    (r"^conditional_transformer\.", "transformer."),
    # diffusers up to 0.20 kept factors in processors of attention, under other names.
    (r"\.processor\.(?=\w+_lora\.(?:down|up)\.)", "."),
    (r"(\.self_attn)\.to_([qkv])_lora\.", r"\1.\2_proj_lora."),
    (r"(\.self_attn)\.to_out_lora\.", r"\1.out_proj_lora."),
    (r"\.to_out_lora\.", ".to_out.0_lora."),
    (r"_lora\.down\.weight$", ".lora_A.weight"),
    (r"_lora\.up\.weight$", ".lora_B.weight"),
)
PIPELINE = (
    Component("transformer.", "transformer", ("transformer_1", "diffusion_model")),
    Component("transformer_2.", "transformer_2"),
    Component("unet.", "unet"),
    Component("text_encoder.", "text_encoder", ("te", "te1")),
    Component("text_encoder_2.", "text_encoder_2", ("te2",)),
    Component("text_encoder_3.", "text_encoder_3", ("te3",)),
    Component("text_conditioner.", "text_conditioner"),
    Component("connectors.", "connectors"),
    Component("prior.", "prior", ("prior_unet",)),
    Component("", ""),
)
"""Parts of a pipeline of diffusers; the last stands for names without one."""
TABLE = Table(
    components=PIPELINE, fields=FIELDS, is_flat=False, renames=RENAMES, adapter_name=ADAPTER_NAME,
    passed=r"bundle_emb\.", stale=KOHYA.stale,
    by_heads=(r"(^|\.)blocks\.\d+\.attn\.qkv_proj$", 128),  # DiffSynth on MiniMax-H3
)  # fmt: skip

# --------------------------------------------------------------------------------- detection

_ENDS = (
    r"\.(lora_|hada_|lokr_|oft_|diff(_b|_m)?$|dora_scale|[wb]_norm$|set_weight|on_input|[ab][12]\.)"
)
_PARTS = (
    r"(unet|(conditional_)?transformer(_2)?|text_encoder(_2|_3)?|prior|connectors|text_conditioner)"
)
_FLAT = (
    r"^(lora_(unet|te\d?|prior_unet|prior_te|transformer)_|lycoris_|Hunyuan_video_I2V_lora_"
    r"|lora___lorahyphen___)"
)
"""Of dialects that have lost the dots of names."""
_OLD_ENDS = r"(\.lora|_lora|lora_linear_layer)\.(down|up)\.weight$"
_XLABS = r"^(diffusion_model\.)?(double|single)_blocks\.\d+\.processor\.\w+_lora[12]?\.(down|up)\."
_MARKS = (
    (_XLABS, "xlabs"),
    (MIXED, "onetrainer"),
    (r"^((model|transformer)\.)?diffusion_model\..*" + _ENDS, "comfyui"),
    (r"^text_encoders\..*" + _ENDS, "comfyui"),
    (_OLD_ENDS, "diffusers"),
)  # fmt: skip
# What names of factors look like that belong to models of images, whoever wrote them.
_OF_IMAGES = (
    r"^diffusion_model\.",
    r"^(unet|transformer_2|text_encoder(_2|_3)?|text_encoders|prior|connectors"
    r"|text_conditioner|conditional_transformer)\.",
    # Only diffusion transformers have these; GPT-2 and MPT also begin with "transformer.".
    r"(^|\.)((single_)?transformer|double|single)_blocks\.|\.(to_q|to_k|to_v|to_out|add_q_proj)\.",
)
_LANGUAGE = r"(^|\.)layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\."
_SAMPLE = 64  # modules by which a family is told


def detector(name: str) -> Detector:
    """Is a file of the dialect of this name?  Of these dialects it is of one at most."""
    return lambda candidate: _name_of(candidate) == name


def _name_of(candidate: Candidate) -> str:
    if candidate.is_peft or candidate.header is None:
        return ""
    return _dialect_of(candidate.keys, HEADER in candidate.header.metadata)


HEADER = "lora_adapter_metadata"
"""Where diffusers states configurations of PEFT, in the file's metadata."""


@lru_cache(maxsize=4)
def _dialect_of(names: tuple[str, ...], has_header: bool) -> str:
    """The name of the dialect, "" if it is none of these."""
    keys = [name for name in names if not re.match(_FLAT, name) or re.match(MIXED, name)]

    def has(pattern: str) -> bool:
        return any(map(re.compile(pattern).search, keys))

    for pattern, name in _MARKS:
        if has(pattern):
            return name
    if not has(_ENDS):
        return ""
    if has(r"\.(query|key)_norm\.scale$"):
        return "bfl"
    has_prefix, has_down = has(rf"^{_PARTS}\."), has(r"\.lora_(down|up)\.weight$|\.dora_scale$")
    if has_header:
        return "diffusers"
    if has_down and not has_prefix:
        return "comfyui"
    if not _is_image(keys, has):
        return ""
    if has_down:
        return "onetrainer"
    return "diffusers" if has(r"\.lora_[AB](\.|$)") else "comfyui"


def _is_image(keys: Iterable[str], has: Callable[[str], bool]) -> bool:
    """Are these modules of image or video models, and not of a language model?"""
    if any(map(has, _OF_IMAGES)):
        return True
    if has(_LANGUAGE):
        return False
    found = (TABLE.parse(name) for name in keys)
    modules = dict.fromkeys(key.module for key in found if key is not None)
    return (
        family_of(dict.fromkeys(list(modules)[:: 1 + len(modules) // _SAMPLE], ())).family
        is not None
    )
