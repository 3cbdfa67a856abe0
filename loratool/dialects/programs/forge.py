"""Forge: names are matched with its maps of UNet and text encoders; 12 may be left, not more."""

from __future__ import annotations

from collections.abc import Iterable

from loratool.dialects.programs import models
from loratool.dialects.programs.base import DROPPED, UNSURE, WRONG, Hit, Program, Rule
from loratool.dialects.programs.grammar import Group
from loratool.dialects.programs.look import Look, once
from loratool.dialects.programs.where import drops_text_model, language, where
from loratool.report.text import plural

_HOME = "https://github.com/lllyasviel/stable-diffusion-webui-forge/blob/main/"
_LOADER = _HOME + "extensions-builtin/sd_forge_lora/networks.py"
_MAPS = _HOME + "packages_3rdparty/comfyui_lora_collection/lora.py"
MOST = 12
"""Keys that may be left over."""

_FOREIGN = ("lycoris_", "lora_transformer_", "bundle_emb.", "base_model.model.")
_UNKNOWN = ("", "oft", "oft_R", "rescale", "set", "reshape", "on_input", "tlora", "magnitude")
_FAMILIES = (models.SD, models.FLUX1)


def _keys(look: Look, group: Group) -> Iterable[str]:
    """Keys of a module that are left over."""
    if group.prefix in _FOREIGN or drops_text_model(look, group):
        return group.keys
    if _is_of(look, group, models.SD3) or _is_peft_unet(look, group):
        return group.keys
    return (k for k, part in group.keys.items() if part in _UNKNOWN or ".default." in k)


def _is_of(look: Look, group: Group, family: str) -> bool:
    """True for a module that diffusers alone calls so."""
    return look.family.name == family and look.naming_of(group) == models.DIFFUSERS


def _is_peft_unet(look: Look, group: Group) -> bool:
    leaf = group.flat.endswith(("_to_q", "_to_k", "_to_v", "_to_out_0"))
    is_own = group.prefix in ("unet.", "") and "_processor_" not in group.flat
    return leaf and is_own and _is_of(look, group, models.SD)


@once
def unmatched(look: Look) -> list[str]:
    """Keys that no map of it has."""
    return [key for group in look.groups for key in _keys(look, group)]


def _refused(look: Look) -> Iterable[Hit]:
    found = unmatched(look)
    if len(found) <= MOST:
        return []
    return [
        Hit(tuple(found), f"{plural(len(found), 'name')} that it does not have, {MOST} may be left")
    ]


def _left(look: Look) -> Iterable[Hit]:
    found = unmatched(look)
    return [Hit(tuple(found))] if 0 < len(found) <= MOST else []


FORGE = Program(
    "forge",
    "Forge",
    "of lllyasviel, last of its main branch",
    (_LOADER, _MAPS),
    (
        Rule("version-mismatch", DROPPED, _refused, "",
             f"with more than {MOST} keys left over the whole file is refused: version mismatch",
             _LOADER, is_mended=True, is_whole=True),
        Rule("unmatched", DROPPED, _left, "names that it does not have",
             f"up to {MOST} keys that are in no map are passed over", _LOADER, is_mended=True),
        Rule("dora-of-peft", WRONG, where(alike=lambda _, g: any(
             "lora_magnitude_vector" in k for k in g.keys)), "DoRA as PEFT names it",
             "the magnitudes are passed over and the plain LoRA is added", _MAPS),
        language("its maps are for Stable Diffusion and FLUX.1", _LOADER),
        Rule("unknown-model", UNSURE, where(alike=lambda look, g:
             look.family.name not in _FAMILIES and not g.is_text), "a model that it may not run",
             "its maps are for Stable Diffusion and FLUX.1", _MAPS),
    ),
    is_of_images=True, homes={"": "kohya"},
)  # fmt: skip
