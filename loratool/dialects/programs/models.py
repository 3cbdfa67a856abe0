"""Which model a file of adapters is for, by the names of its modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from loratool.archs import families as archs
from loratool.dialects.programs.grammar import Group
from loratool.lazy import regex

ORIGINAL, DIFFUSERS = "original", "diffusers"
SD, SD3, FLUX1, FLUX2, QWEN, WAN = "sd", "sd3", "flux1", "flux2", "qwen-image", "wan"
Z_IMAGE, LUMINA2, KREA2, ANIMA = "z-image", "lumina2", "krea-2", "anima"
HUNYUAN, LTX, HIDREAM = "hunyuan-video", "ltx", "hidream"
_FAMILIES = {
    **dict.fromkeys(("sd1", "sd2", "sdxl", "sdxl_refiner", "ssd_1b", "vega"), SD),
    **dict.fromkeys(("hunyuan_video", "hunyuan_video_15", "framepack"), HUNYUAN),
    **dict.fromkeys(("ltx_video", "ltx2"), LTX),
    "chroma": FLUX1, "qwen_image": QWEN, "z_image": Z_IMAGE, "krea2": KREA2, "hidream_i1": HIDREAM,
}  # fmt: skip
"""Families that programs load alike, or call otherwise than their file is called."""
_SHARED = (FLUX1, FLUX2, Z_IMAGE, HUNYUAN)
"""Models of whose names others have most: the maps tell them apart."""
_BLOCK = r"(layers|noise_refiner|context_refiner)_\d+_"

_NAMES = (
    (SD, ORIGINAL, r"(input_blocks|output_blocks|middle_block)_\d|time_embed_\d|label_emb_"),
    (SD, DIFFUSERS, r"(down_blocks|up_blocks)_\d|mid_block_|time_embedding_linear_|add_embedding_"),
    (SD3, ORIGINAL, r"joint_blocks_\d"),
    (FLUX2, ORIGINAL, r"(single_stream|double_stream)_modulation(_img|_txt)?_lin$"),
    (FLUX2, DIFFUSERS, r"single_transformer_blocks_\d+_attn_(to_qkv_mlp_proj|to_out)$"
                       r"|transformer_blocks_\d+_ff(_context)?_linear_(in|out)$|time_guidance_embed_"
                       r"|(single_stream|double_stream)_modulation(_img|_txt)?_linear$"),
    (HUNYUAN, ORIGINAL, r"double_blocks_\d+_(img|txt)_(attn_[qkv]|mlp_fc[12]|mod_linear)$"
                        r"|single_blocks_\d+_modulation_linear$|txt_in_individual_token_refiner"),
    (FLUX1, ORIGINAL, r"double_blocks_\d+_(img|txt)_(attn_(qkv|proj|norm)|mlp_[02]|mod_lin)"
                      r"|single_blocks_\d+_(linear[12]|modulation_lin$|norm)"
                      r"|(double|single)_blocks_\d+_processor_"),
    (QWEN, DIFFUSERS, r"transformer_blocks_\d+_(img|txt)_(mlp|mod)_"),
    (KREA2, DIFFUSERS, r"transformer_blocks_\d+_attn_to_gate$|text_fusion_"),
    (FLUX1, DIFFUSERS, r"single_transformer_blocks_\d+_(attn_to_|proj_|norm_linear)"
                       r"|transformer_blocks_\d+_(ff_context_net|norm1_context|attn_to_add_out)"),
    (WAN, ORIGINAL, r"(vace_)?blocks_\d+_((self|cross)_attn_([qkvo]|[kv]_img|norm_[qk])$|ffn_[02]$"
                    r"|modulation$|norm3$)"),
    (WAN, DIFFUSERS, r"blocks_\d+_(attn[12]_(to|add)_|ffn_net_)|condition_embedder_"),
    (ANIMA, ORIGINAL, r"blocks_\d+_((self|cross)_attn_([qkv]_proj|output_proj)$|adaln_modulation_)"
                      r"|llm_adapter_"),
    (KREA2, ORIGINAL, r"blocks_\d+_attn_(w[qkvo]|gate)$|txtfusion_"),
    (Z_IMAGE, DIFFUSERS, _BLOCK + r"attention_(to_[qkv]|to_out_0|norm_[qk])$|all_(final|x)_"),
    (LUMINA2, DIFFUSERS, _BLOCK + r"(attn_to_|feed_forward_linear_)"),
    (Z_IMAGE, ORIGINAL, _BLOCK + r"attention_(qkv|out)$"),
    (HIDREAM, DIFFUSERS, r"(double|single)_stream_blocks_\d+_block_"),
    (LTX, ORIGINAL, r"patchify_proj$|(audio_)?adaln_single_"),
)  # fmt: skip
_PATTERNS = [(family, naming, regex(words)) for family, naming, words in _NAMES]


class Family(NamedTuple):
    """A model, "" if it is not known, and whose names the file has: ``original`` or ``diffusers``.

    A file of mixed names has those of most of its modules.
    """

    name: str = ""
    naming: str = ""


def naming_of(group: Group) -> Family:
    """The model that a module's name is of; of several the first of the table."""
    return Family() if group.is_text else _named(group.flat)


@lru_cache(maxsize=1 << 14)  # every program asks for every module
def _named(flat: str) -> Family:
    return next((Family(f, n) for f, n, words in _PATTERNS if words.match(flat)), Family())


def family_of(groups: Sequence[Group]) -> Family:
    """The model of a file: by most of its names, and by the maps of families if shared."""
    if archs.is_language(g.stem for g in groups):
        return Family()
    mine = [g for g in groups if g.kind and not g.is_text]
    found = Counter(family for g in mine if (family := naming_of(g)).name)
    most, count = found.most_common(1)[0] if found else (Family(), 0)
    if 2 * count >= len(mine) and most.name and most.name not in _SHARED:
        return most  # as nearly all files, and no maps are asked
    factored = [g for g in mine if g.kind not in ("full", "norm", "set")]
    guess = archs.family_of({f"unet.{g.path}": _shape(g) for g in factored or mine})
    name = most.name
    if guess.family is not None:
        name = _FAMILIES.get(guess.family, guess.family)
    is_split = any(f.name == HUNYUAN for f in found) or any(
        "_attn_qkv" in g.path and not g.is_flat for g in mine)  # fmt: skip
    if name == FLUX1 and is_split:
        name = HUNYUAN
    if name == most.name or guess.family is None:
        return Family(name, most.naming)
    at = (archs.places("", g.path, family=guess.family) for g in groups)
    namings = Counter(p[0].naming for p in at if p)
    return Family(name, namings.most_common(1)[0][0] if namings else "")


def _shape(group: Group) -> tuple[int, ...]:
    """Of the change, () where it is not known."""
    sides = (_rows(group), _columns(group))
    return sides if all(sides) else ()


def _rows(group: Group) -> int:
    return next(iter(group.shape("up")), 0)


def _columns(group: Group) -> int:
    return next(iter(group.shape("down")[1:]), 0)
