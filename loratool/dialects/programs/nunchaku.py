"""nunchaku: LoRA of FLUX.1, by diffusers' converter, then rewritten for its quantised layers.

What stands here was seen of its `to_nunchaku`, `compose_lora` and `fuse_vectors` with diffusers
0.42.1, and in `update_lora_params`, which takes the rest for modules of the model itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from loratool.dialects.programs import models
from loratool.dialects.programs.base import DROPPED, RAISES, UNSURE, WRONG, Hit, Program, Rule
from loratool.dialects.programs.diffusers_spelled import FLUX_RULES
from loratool.dialects.programs.grammar import Group
from loratool.dialects.programs.look import Look
from loratool.dialects.programs.where import has_prefix, is_alone, language, numbered, where

_LORA = "https://github.com/nunchaku-tech/nunchaku/blob/3a3cc3d/nunchaku/lora/flux/"
_CONVERT, _PACK = _LORA + "diffusers_converter.py", _LORA + "nunchaku_converter.py"
_NODE = _LORA + "compose.py"
_UPDATE = _LORA.replace("lora/flux/", "models/transformers/transformer_flux.py")
_ISSUES = "https://github.com/nunchaku-tech/ComfyUI-nunchaku/issues/"

_FLUX = (models.FLUX1,)
_OF_DIFFUSERS = (
    "flux-depth", "flux-left", "flux-biases", "flux-norms", "flux-beside-transformer",
    "flux-beside-mixture", "flux-embedding", "control-partial", "control-final",
)  # fmt: skip
"""Rules of the converter that it calls first."""
_ALGORITHMS = ("loha", "lokr", "glora", "oft", "ia3", "tlora", "tucker", "norm")
_PARTNERS = (
    ("_ff_net_0_proj", "_ff_net_2"), ("_ff_context_net_0_proj", "_ff_context_net_2"),
    ("_img_mlp_0", "_img_mlp_2"), ("_txt_mlp_0", "_txt_mlp_2"),
    ("_proj_out", "_proj_mlp"), ("_linear2", "_linear1"),
)  # fmt: skip
"""What it looks for beside a module of a block."""


def _is_other(look: Look, _: Group) -> bool:
    return look.family.map not in ("", models.FLUX1)


def _is_text_error(look: Look, group: Group) -> bool:
    """True for modules of a text encoder that are left among those of the model."""
    left = group.prefix.startswith("text_encoder.") or has_prefix(look, "lora_transformer_")
    return group.is_text and left


def _is_unknown(look: Look, group: Group) -> bool:
    """True for names that it takes for the model's own, and that are not."""
    is_own = group.prefix == "transformer." or (
        group.prefix == "diffusion_model." and group.uses_letters
    )
    return is_own and look.naming_of(group) == models.ORIGINAL


def _is_lost(look: Look, group: Group) -> bool:
    """True for names that become those of no module."""
    if group.prefix.startswith(("lycoris_", "base_model.model.")):
        return True
    if any(re.search(r"\.lora_[AB]\.(?!weight$|bias$)", key) for key in group.keys):
        return True
    is_bare = not group.prefix and "_processor_" not in group.flat
    return is_bare and look.naming_of(group) == models.ORIGINAL and not any(
        "query_norm.scale" in key for key in look.tensors
    )  # fmt: skip


def _without_partner(look: Look) -> Iterable[Hit]:
    if look.family.name not in _FLUX:
        return []
    flat = {g.flat for g in look.groups}
    lost = tuple(
        g.stem for g in look.groups for one, other in _PARTNERS
        if g.flat.endswith(one) and "_blocks_" in g.flat
        and f"{g.flat.removesuffix(one)}{other}" not in flat
    )  # fmt: skip
    return [Hit(lost)] if lost else []


def _in_part(look: Look) -> Iterable[Hit]:
    """One or two of q, k and v."""
    found: dict[str, list[str]] = {}
    for group in look.groups:
        if part := re.fullmatch(r"(.*_attn_(?:to|add)_)[qkv](_proj)?", group.flat):
            found.setdefault(part[1], []).append(group.stem)
    names = tuple(stem for some in found.values() if len(some) < 3 for stem in some)
    return [Hit(names)] if names and look.family.name in _FLUX else []


def _is_wide_bias(look: Look, group: Group) -> bool:
    return any(look.tensors[key].dtype not in ("F16", "BF16") for key in group.of("bias"))


NUNCHAKU = Program(
    "nunchaku",
    "nunchaku",
    "3a3cc3d",
    (_CONVERT, _PACK, _UPDATE),
    (
        Rule("other-model", RAISES, where(alike=_is_other), "a model that it does not have",
             "it has loaders of LoRA for FLUX.1 alone", _CONVERT),
        *(r for r in FLUX_RULES if r.name in _OF_DIFFUSERS),
        Rule("text-left", RAISES, where(family=_FLUX, on=_is_text_error), "text encoders",
             "it looks for them among the model's own modules: KeyError", _UPDATE),
        Rule("text", DROPPED, where(family=_FLUX, alike=lambda _, g: g.is_text), "text encoders",
             "it has no part in them", _UPDATE),
        Rule("names", RAISES, where(family=_FLUX, on=_is_unknown), "names that it does not convert",
             "it takes them for the model's own: KeyError", _UPDATE, is_mended=True),
        Rule("lost-names", DROPPED, where(family=_FLUX, on=_is_lost),
             "names that it does not convert", "nothing asks for what they become", _PACK,
             is_mended=True),
        Rule("algorithm", RAISES, where(kind=_ALGORITHMS), "anything but plain LoRA",
             "it takes lora_A with lora_B alone", _CONVERT, is_mended=True),
        Rule("full", DROPPED, where(part=("diff", "set")), "whole differences",
             "it takes lora_A with lora_B alone", _CONVERT, is_mended=True),
        Rule("one-factor", RAISES, where(kind=("lora",), alike=is_alone),
             "one factor alone", "it needs lora_A and lora_B", _PACK),
        Rule("partner", RAISES, _without_partner, "one half of a block's MLP",
             "it stops at ff.net.0.proj without ff.net.2, at proj_out without proj_mlp", _PACK),
        Rule("bias", RAISES, where(part=("bias",), path=r"_blocks_\d+_(?!norm)",
             on=_is_wide_bias), "biases in float32",
             "it packs biases of two bytes alone", _ISSUES + "94"),
        Rule("dora", WRONG, where(part=("dora", "magnitude")), "DoRA",
             "the magnitudes are passed over and the plain LoRA is added", _CONVERT),
        Rule("alpha", WRONG, where(family=_FLUX, prefix=r"(transformer\.)?", part=("alpha",),
             alike=numbered), "alpha beside lora_down",
             "behind transformer. it is passed over; its node for ComfyUI stops there", _CONVERT,
             is_mended=True),
        Rule("in-part", UNSURE, _in_part, "q, k or v alone",
             "its node for ComfyUI stops at q without k and v, and passes over k and v without q",
             _NODE),
        language("it has loaders of LoRA for FLUX.1 alone", _CONVERT),
        Rule("unknown-model", UNSURE, where(alike=lambda look, g:
             not (look.family.name or g.is_text)), "a model that is not known here",
             "it has loaders of LoRA for FLUX.1 alone", _CONVERT),
    ),
    is_of_images=True, homes={"": "diffusers"},
)  # fmt: skip
