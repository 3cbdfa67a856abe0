"""diffusers' rules for FLUX, Qwen-Image and Z-Image, which have the most spellings."""

from __future__ import annotations

import re
from collections.abc import Iterable

from loratool.dialects.programs import models
from loratool.dialects.programs.base import DROPPED, RAISES, WRONG, Hit, Rule, Test
from loratool.dialects.programs.grammar import Group
from loratool.dialects.programs.look import Look, once
from loratool.dialects.programs.models import FLUX1, FLUX2, QWEN, WAN, Z_IMAGE
from loratool.dialects.programs.where import (
    FACTORS,
    has_prefix,
    lacks_alpha,
    lettered,
    numbered,
    where,
)

_HOME = "https://github.com/huggingface/diffusers/"
_ISSUES, _PULLS = _HOME + "issues/", _HOME + "pull/"
_CODE = _HOME + "blob/v0.42.1/src/diffusers/loaders/lora_conversion_utils.py"
_PIPELINES = _HOME + "blob/v0.42.1/src/diffusers/loaders/lora_pipeline.py"
_BLOCKS = {"double": 19, "single": 38}
_TOP = r"^(img_in|txt_in|time_in|vector_in|guidance_in|final_layer)"
_FLAT = r"lora_unet_|diffusion_model\."
_DOTTED = r"diffusion_model\.|base_model\.model\."
_CONTROL_TARGETS = ("img_in", "txt_in", "time_in_in_layer", "final_layer_linear")


@once
def _is_kohya(look: Look) -> bool:
    """True if its converter of kohya's names runs, which one ``lora_down`` is enough for."""
    return any(".lora_down.weight" in key for key in look.tensors)


@once
def _is_control(look: Look) -> bool:
    return any("query_norm.scale" in key for key in look.tensors) and not _is_kohya(look)


def _kohya(test: Test) -> Test:
    return lambda look: test(look) if _is_kohya(look) else []


def _beside(prefix: str, *lost: str) -> Test:
    """What is dropped because something else begins with a prefix."""

    def find(look: Look) -> Iterable[Hit]:
        if look.family.name != FLUX1 or not has_prefix(look, prefix):
            return []
        names = tuple(
            g.stem for g in look.groups
            if g.prefix != prefix and (not lost or g.prefix in lost)
        )  # fmt: skip
        return [Hit(names)] if names else []

    return _kohya(find)


def _is_beyond(look: Look, group: Group) -> bool:
    found = re.match(r"(double|single)_blocks_(\d+)_", group.flat)
    return found is not None and int(found[2]) >= _BLOCKS[found[1]]


def _is_left(look: Look, group: Group) -> bool:
    """Tensors of kohya's names that no assignment takes."""
    if has_prefix(look, "transformer.") or has_prefix(look, "lora_transformer_"):
        return False
    odd = group.parts - FACTORS - {"diff_b", "diff", "dora"}
    in_block = re.match("(double|single)_blocks_", group.flat)
    is_own = in_block and look.naming_of(group) == models.ORIGINAL
    known = is_own or re.match(_TOP, group.flat)
    return bool(odd) or not known or ("down" not in group.parts and "alpha" in group.parts)


def _norms(look: Look, group: Group) -> bool:
    return any(".diff" in key for key in group.keys)


def _partial_control(look: Look) -> Iterable[Hit]:
    if look.family.name != FLUX1 or not _is_control(look):
        return []
    flat = {g.flat for g in look.groups}
    needed = [*_CONTROL_TARGETS]
    needed += [f"double_blocks_{i}_img_attn_qkv" for i in range(_BLOCKS["double"])]
    needed += [f"single_blocks_{i}_linear1" for i in range(_BLOCKS["single"])]
    lost = [name for name in needed if name not in flat]
    return [Hit((), f"no {lost[0]}, which its converter takes for granted")] if lost else []


def _control_final(look: Look, group: Group) -> bool:
    return _is_control(look)


def _not_converted(look: Look, group: Group) -> bool:
    """True for names that are neither kohya's nor of another converter."""
    others = _is_control(look) or has_prefix(look, "base_model.model.")
    if _is_kohya(look) or others or "_processor_" in group.flat:
        return False
    own = group.prefix.startswith(("transformer.", "text_encoder."))
    return not own or look.naming_of(group) == models.ORIGINAL


def _is_original(look: Look, group: Group) -> bool:
    return look.naming_of(group) == models.ORIGINAL


def _flux2_foreign(look: Look, group: Group) -> bool:
    if _is_kohya(look):
        return group.prefix != "lora_unet_"
    if group.kind == "lokr" and group.prefix == "lycoris_":
        return False
    taken = ("diffusion_model.", "base_model.model.", "transformer.")
    return group.prefix not in taken


FLUX_RULES = (
    Rule("flux-top", DROPPED, _kohya(where(family=(FLUX1,), prefix=_FLAT, path=_TOP)),
         "modules outside of the blocks", "they come out without transformer. and are not loaded",
         _CODE, is_mended=True),
    Rule("flux-depth", RAISES, _kohya(where(family=(FLUX1,), prefix=_FLAT, on=_is_beyond)),
         "more blocks than FLUX.1", "blocks from 19 and 38 on are left over: ValueError", _CODE),
    Rule("flux-left", RAISES, _kohya(where(family=(FLUX1,), prefix=_FLAT, on=_is_left)),
         "tensors that are not renamed", "what is left over is an error: incompatible keys", _CODE,
         is_mended=True),
    Rule("flux-te", DROPPED, _kohya(where(family=(FLUX1,), prefix=r"lora_te[23]_|text_encoders\.",
         path=r"^(?!clip_l)")), "text encoders but CLIP-L", "they are filtered out", _CODE),
    Rule("flux-biases", DROPPED, _kohya(where(family=(FLUX1,), part=("diff_b",))), "biases",
         "they are filtered out", _CODE),
    Rule("flux-own-diff", DROPPED, where(family=(FLUX1,), prefix=r"transformer\.",
         part=("diff", "diff_b", "norm")), "differences behind transformer.",
         "names without lora in them are left behind", _PIPELINES),
    Rule("flux-norms", DROPPED, _kohya(where(family=(FLUX1,), path="norm", part=("diff",),
         alike=_norms)), "norms", "they are filtered out", _CODE),
    Rule("flux-beside-transformer", DROPPED, _beside("transformer."), "beside transformer.",
         "once a name begins with transformer. all others are dropped", _CODE, is_mended=True),
    Rule("flux-beside-mixture", DROPPED, _beside("lora_transformer_", "lora_unet_"),
         "beside lora_transformer_", "once there is one of these, lora_unet_ is dropped", _CODE,
         is_mended=True),
    Rule("flux-original", DROPPED, _kohya(where(family=(FLUX1,), prefix=r"transformer\.",
         on=_is_original)), "original names behind transformer.", "the model has no such modules",
         _CODE, is_mended=True),
    Rule("flux-embedding", DROPPED, _kohya(where(family=(FLUX1, FLUX2), part=("embedding",))),
         "bundled embeddings", "they are filtered out", _CODE, is_mended=True),
    Rule("flux-int-alpha", RAISES, where(family=(FLUX1,), part=("alpha",), on=lambda look, g:
         not _is_kohya(look) and any(g.tensors[k].dtype.startswith(("I", "U"))
         for k in g.of("alpha"))), "a whole number as alpha", "alpha must be of a float type",
         _PIPELINES, is_mended=True),
    Rule("flux-foreign", DROPPED, where(family=(FLUX1,), on=_not_converted),
         "names that it does not convert",
         "lora_A under the original names is not converted: nothing of it is loaded", _PIPELINES,
         is_mended=True),
    Rule("control-partial", RAISES, _partial_control, "",
         "the converter of control LoRAs needs every block and target: KeyError", _CODE),
    Rule("control-final", WRONG, where(family=(FLUX1,), path=r"^final_layer_adaLN_modulation_1$",
         alike=_control_final), "the last modulation",
         "both factors' halves are swapped where lora_B's must be", _CODE, is_mended=True),
    Rule("flux2-top", DROPPED, _kohya(where(family=(FLUX2,), prefix="lora_unet_",
         path=r"_modulation|^guidance_in|^final_layer_adaLN|^vector_in")),
         "modulations and guidance", "they are left over, with a warning", _CODE, is_mended=True),
    Rule("flux2-alpha", RAISES, where(family=(FLUX2,), prefix=_DOTTED,
         part=("alpha",), alike=lambda look, g: not _is_kohya(look) and g.kind != "lokr"),
         "alpha beside lora_A", "it is left over: ValueError", _CODE, is_mended=True),
    Rule("flux2-algorithm", RAISES, where(family=(FLUX2,), prefix=r"diffusion_model\.",
         kind=("loha", "oft", "glora", "full", "norm"), alike=lambda look, _: not _is_kohya(look)),
         "anything but LoRA", "it is left over: ValueError", _CODE, is_mended=True),
    Rule("flux2-final", WRONG, where(family=(FLUX2,), path=r"^final_layer_adaLN_modulation_1$",
         prefix=_DOTTED), "the last modulation",
         "the halves of lora_B are not swapped", _CODE, is_mended=True),
    Rule("flux3-top", DROPPED, where(family=("flux3",), prefix=r"diffusion_model\.",
         path=r"^(emb_in|txt_in$|time_in|ref_time_in|final_layer)|_modulations_.*_lin$"),
         "modules outside of the blocks", "their names are not mapped", _CODE, is_mended=True),
    Rule("flux2-foreign", DROPPED, where(family=(FLUX2,), alike=_flux2_foreign),
         "names that it does not convert", "they are left over, with a warning", _PIPELINES,
         is_mended=True),
)  # fmt: skip


# -------------------------------------------------------------------- Qwen-Image, Z-Image


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
