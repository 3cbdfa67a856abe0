"""diffusers' rules for Qwen-Image and Z-Image, whose converters are of one kind."""

from __future__ import annotations

import re

from loratool.dialects.programs.base import DROPPED, RAISES, WRONG, Rule
from loratool.dialects.programs.grammar import Group
from loratool.dialects.programs.look import Look, once
from loratool.dialects.programs.models import QWEN, WAN, Z_IMAGE
from loratool.dialects.programs.where import has_prefix, lacks_alpha, lettered, numbered, where

_HOME = "https://github.com/huggingface/diffusers/"
_CODE = _HOME + "blob/v0.42.1/src/diffusers/loaders/lora_conversion_utils.py"
_ISSUES, _PULLS = _HOME + "issues/", _HOME + "pull/"


def is_converted(look: Look) -> bool:
    """True if the converters of Qwen-Image and Z-Image run."""
    return any(
        g.prefix in ("diffusion_model.", "lora_unet_") or "alpha" in g.parts
        or any("default." in k for k in g.keys) for g in look.groups
    )  # fmt: skip


@once
def _has_both(look: Look) -> bool:
    spellings = {g.uses_letters for g in look.groups if g.kind == "lora"}
    return len(spellings) == 2 and (is_converted(look) or has_prefix(look, "diffusion_model."))


def _is_beyond_qwen(_: Look, group: Group) -> bool:
    """True for names of Qwen-Image-2.1 that the converter of Qwen-Image does not know."""
    is_broken = re.search(r"img_mlp_gate_layer$|^txt_in_.+|^modulation_1$", group.flat)
    is_fused = group.flat.endswith("img_mlp_gate_up")
    return is_fused or (group.prefix == "lora_unet_" and is_broken is not None)


def _is_doubled(look: Look, group: Group) -> bool:
    return group.prefix == "transformer." and is_converted(look)


QWEN_RULES = (
    Rule("z-fused", DROPPED, where(family=(Z_IMAGE,), path=r"_attention_qkv$", kind=("lora",),
         alike=lambda _, g: g.uses_letters or not g.is_flat), "fused attention",
         "the name is passed on, and the model has no such module", _ISSUES + "13203",
         is_mended=True),
    Rule("z-fused-kohya", RAISES, where(family=(Z_IMAGE,), path=r"_attention_qkv$",
         prefix="lora_unet_", alike=numbered), "fused attention", "it was left over: ValueError",
         _ISSUES + "13203", until="0.42"),
    Rule("z-out", DROPPED, where(family=(Z_IMAGE,), path=r"_attention_out$", alike=lettered),
         "attention.out as lora_A", "it is renamed as lora_down alone", _CODE, is_mended=True),
    Rule("z-double", DROPPED, where(family=(Z_IMAGE,), prefix="lora_unet__"),
         "two underscores", "the names come out broken", _CODE, is_mended=True),
    Rule("z-top", DROPPED, where(family=(Z_IMAGE,), path=r"^(final_layer|x_embedder)",
         prefix=r"diffusion_model\.|lora_unet_"), "modules outside of the layers",
         "their names are not mapped", _CODE, is_mended=True),
    Rule("two-spellings", RAISES, where(family=(WAN, QWEN, Z_IMAGE), kind=("lora",),
         alike=lambda look, _: _has_both(look)), "lora_A beside lora_down",
         "its converter takes one of both spellings", _CODE, is_mended=True),
    Rule("doubled-prefix", DROPPED, where(family=(QWEN, Z_IMAGE), alike=_is_doubled),
         "transformer. beside alpha", "the converter puts transformer. before it once more", _CODE,
         is_mended=True),
    Rule("qwen21-names", DROPPED, where(family=(QWEN,), alike=_is_beyond_qwen),
         "names of Qwen-Image-2.1", "its converter is of Qwen-Image: the names come out broken",
         _CODE, is_mended=True),
    Rule("qwen-alpha", WRONG, where(family=(QWEN,), part=("alpha",), alike=lettered),
         "alpha beside lora_A", "alpha was deleted: the scale was 1", _ISSUES + "14088",
         until="0.42"),
    Rule("qwen-no-alpha", RAISES, where(family=(QWEN,), kind=("lora",), alike=lambda look, g:
         numbered(look, g) and lacks_alpha(look, g)), "no alpha", "it was a KeyError",
         _PULLS + "14165", until="0.42"),
)  # fmt: skip
