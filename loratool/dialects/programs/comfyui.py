"""ComfyUI: one adapter for each weight that its key map names; the rest is logged and passed over.

Alpha is applied everywhere, metadata nowhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from loratool.dialects.programs import models
from loratool.dialects.programs.base import DROPPED, RAISES, UNSURE, WRONG, Hit, Program, Rule
from loratool.dialects.programs.grammar import Group
from loratool.dialects.programs.look import Look
from loratool.dialects.programs.where import drops_text_model, is_alone, numel, where
from loratool.lazy import regex

_HOME = "https://github.com/comfyanonymous/ComfyUI/blob/master/comfy/"
_KEYS, _ADAPTERS = _HOME + "lora.py", _HOME + "weight_adapter/"
_CONVERT = _HOME + "lora_convert.py"
_ISSUES = "https://github.com/comfyanonymous/ComfyUI/issues/"

_OWN = ("diffusion_model.", "lora_unet_", "lora_unet__")
_DIFFUSERS = {
    models.SD: ("lora_unet_", "lycoris_", "unet.", ""),
    models.SD3: (
        "transformer.",
        "base_model.model.",
        "lora_transformer_",
        "lycoris_",
        "lora_unet_",
    ),
    models.FLUX1: ("transformer.", "lycoris_", "lora_transformer_", ""),
    models.FLUX2: ("transformer.", "lycoris_", "lora_transformer_", ""),
    "pixart": ("transformer.", "base_model.model.", "unet.base_model.model."),
    "auraflow": ("transformer.",),
    models.QWEN: ("transformer.", "lycoris_", ""),
    models.HIDREAM: ("transformer.", "lycoris_"),
    models.Z_IMAGE: ("transformer.", "diffusion_model.", "lycoris_", ""),
    models.LUMINA2: ("transformer.", "diffusion_model.", "lycoris_", ""),
}
"""Model -> how names of diffusers may begin."""
_ORIGINAL = {
    models.SD: ("lycoris_",), models.HUNYUAN: ("transformer.",),
    **dict.fromkeys((models.LTX, "mochi", "omnigen2"), ("",)),
}  # fmt: skip
"""Model -> how its own names may begin besides `_OWN`."""
# HunyuanVideo's trainers' names that its map has behind a dot only, and those that it has nowhere.
_DOTTED = regex(r"(mlp_fc[12]|_mod_linear|modulation_linear)$")
_NOWHERE = regex(r"double_blocks_\d+_(img|txt)_attn_[qkv]$")
_NO_UNET = ("bundle_emb.", "text_conditioner.", "connectors.")


def _is_known(look: Look, group: Group) -> bool:
    """False if the key map has no such name."""
    if group.stem == "lora_te_text_projection":  # it has those of te1 and te2
        return False
    if group.is_text or group.prefix in _NO_UNET or not look.family.name:
        return True
    if "_processor_" in group.flat or group.prefix == "lora_prior_unet_":
        return True  # XLabs, Stable Cascade
    name, naming = look.family.name, look.naming_of(group) or look.family.naming
    if (
        name == models.HUNYUAN
        and naming == models.ORIGINAL
        and (_NOWHERE.match(group.flat) or (group.is_flat and _DOTTED.search(group.flat)))
    ):
        return False
    if not group.prefix and _is_control(look):
        return True
    takes: tuple[str, ...] = ()
    if naming != models.DIFFUSERS:
        takes += (*_OWN, *_ORIGINAL.get(name, ()))
    if naming != models.ORIGINAL:
        takes += _DIFFUSERS.get(name, ())
    return group.prefix in takes


def _is_control(look: Look) -> bool:
    return "img_in.lora_A.weight" in look.tensors


def _is_peft_unet(look: Look, group: Group) -> bool:
    """``attn1.to_q.lora_A``: the map has ``attn1.processor.to_q`` there."""
    return group.prefix in ("unet.", "") and "_processor_" not in group.flat


def _by_rows(_: Look, group: Group) -> bool:
    """True for DoRA's lengths of rows, in the shape that ComfyUI takes."""
    shape = group.shape("dora")
    return len(shape) > 1 and shape[0] > 1 and numel(shape) == shape[0]


def _is_flat_dora(_: Look, group: Group) -> bool:
    return len(group.shape("dora")) == 1


def _is_butterfly(_: Look, group: Group) -> bool:
    return len(group.shape("oft")) == 4


def _states_scale(look: Look) -> Iterable[Hit]:
    """Scales that stand in the metadata of diffusers alone."""
    try:
        stated = json.loads(look.metadata.get("lora_adapter_metadata", "{}"))
    except ValueError:
        return []
    odd = any(
        (key.endswith("alpha_pattern") and value)
        or (key.endswith("use_rslora") and value)
        or (key.endswith("lora_alpha") and value != stated.get(key[: -len("lora_alpha")] + "r"))
        for key, value in stated.items()
    )
    names = tuple(g.stem for g in look.groups if g.uses_letters and "alpha" not in g.parts)
    return [Hit(names)] if odd and names else []


def _header_alpha(look: Look) -> Iterable[Hit]:
    if "alpha" not in look.metadata or any("alpha" in g.parts for g in look.groups):
        return []
    names = tuple(g.stem for g in look.groups if "_qkv_proj" in g.flat or "_adaln_proj" in g.flat)
    return [Hit(names)] if names else []


def _twice(look: Look) -> Iterable[Hit]:
    """All but the last of several spellings of one target."""
    last: dict[tuple[str, str], Group] = {}
    lost = []
    for group in look.groups:
        target = (_encoder(group), group.flat)
        if group.parts & {"down", "up", "hada", "lokr", "diff"} and group.prefix != "bundle_emb.":
            if target in last and last[target].prefix != group.prefix:
                lost.append(last[target].stem)
            last[target] = group
    return [Hit(tuple(lost))] if lost else []


def _encoder(group: Group) -> str:
    """Which text encoder a module is of, "" for one of the model itself."""
    return next((n for n in "23" if n in group.prefix), "1") if group.is_text else ""


def _fused_and_split(look: Look) -> Iterable[Hit]:
    flat = {g.flat: g.stem for g in look.groups if "down" in g.parts}
    names = tuple(_pairs(flat))
    return [Hit(names)] if names else []


def _pairs(flat: dict[str, str]) -> Iterator[str]:
    for name, stem in flat.items():
        block = name.removesuffix("qkv")
        split = [flat[f"{block}to_{leaf}"] for leaf in "qkv" if f"{block}to_{leaf}" in flat]
        if name.endswith("_qkv") and split:
            yield from (stem, *split)


def _modulations(look: Look) -> Iterable[Hit]:
    names = tuple(k for g in look.groups for k in g.of("diff") if k.endswith(".diff_m"))
    return [Hit(names)] if names else []


_COLUMNS = 64  # of FLUX.1's input layer


def _is_wide(look: Look, group: Group) -> bool:
    """An input layer of more channels, in a file that does not say that the weight grows."""
    is_said = "reshape" in group.parts or _is_control(look)
    return group.shape("down")[1:2] > (_COLUMNS,) and not is_said


COMFYUI = Program(
    "comfyui",
    "ComfyUI",
    "a125cd84 (2025-10-12), later names from its pull requests",
    (_KEYS, _ADAPTERS, _CONVERT),
    (
        Rule("boft-alpha", RAISES, where(part=("oft",), on=lambda look, g:
             _is_butterfly(look, g) and "alpha" not in g.parts),
             "BOFT without alpha", "loading BOFT without an alpha tensor is an error",
             _ADAPTERS + "boft.py", is_mended=True),
        Rule("peft-unet", DROPPED, where(family=(models.SD,), path=r"_to_(q|k|v|out_0)$",
             alike=_is_peft_unet), "PEFT names of the UNet's attention",
             "the map has attn1.processor.to_q where the file has attn1.to_q", _ISSUES + "9753",
             is_mended=True),
        Rule("text-model", DROPPED, where(alike=drops_text_model),
             "text encoder without text_model in its names",
             "the map has text_model_encoder_layers where the file has encoder_layers",
             "https://github.com/huggingface/diffusers/issues/13984", is_mended=True),
        Rule("unknown-name", DROPPED, where(on=lambda look, g: not _is_known(look, g)),
             "names that are not in its map", "the key map of this model has no such name", _KEYS,
             is_mended=True),
        Rule("unknown-end", DROPPED, where(part=("",)), "unknown tensors",
             "what these names end in belongs to no algorithm that it has", _KEYS),
        Rule("diff-m", DROPPED, _modulations, "diff_m",
             "it has no such ending; the parameter's whole name with diff behind it loads",
             _KEYS, is_mended=True),
        Rule("bundle-emb", DROPPED, where(part=("embedding",)), "bundled embeddings",
             "embeddings in the file are not loaded", _ISSUES + "3659", is_mended=True),
        Rule("ia3", DROPPED, where(kind=("ia3",)), "IA³", "it has no IA³", _ADAPTERS),
        Rule("t-lora", DROPPED, where(kind=("tlora",)), "T-LoRA", "it has no T-LoRA", _ADAPTERS),
        Rule("oft-of-peft", DROPPED, where(part=("oft_R",)), "OFT of PEFT or OneTrainer",
             "it has LyCORIS' OFT alone", _ADAPTERS + "oft.py"),
        Rule("one-factor", DROPPED, where(kind=("lora",), alike=is_alone), "one factor alone",
             "a lora_A without its lora_B is passed over", _ADAPTERS + "lora.py"),
        Rule("lokr-core", DROPPED, where(alike=lambda _, g: "lokr_core" in g.parts),
             "cores of LoKr", "a LoKr of a convolution with a Tucker core is not applied",
             _ISSUES + "11245", is_mended=True),
        Rule("dora-1d", DROPPED, where(alike=lambda _, g:
             any(k.endswith("dora_scale") for k in g.of("dora")), on=_is_flat_dora),
             "DoRA of one dimension",
             "a dora_scale without a second dimension fails and its weight stays as it is",
             _ISSUES + "12938"),
        Rule("twice", DROPPED, _twice, "a weight under two names",
             "there is one adapter for a weight: the later spelling wins", _KEYS),
        Rule("magnitude", WRONG, where(alike=lambda _, g: "magnitude" in g.parts or any(
             "lora_magnitude_vector" in k for k in g.keys)), "DoRA as PEFT or ai-toolkit names it",
             "the magnitudes are passed over and the plain LoRA is added", _KEYS),
        Rule("dora-rows", WRONG, where(part=("dora",), on=_by_rows), "DoRA of rows",
             "it divides by the lengths of W where those of W + ΔW are meant",
             "https://github.com/Comfy-Org/ComfyUI/pull/15458"),
        Rule("oft-rescale", WRONG, where(part=("rescale",)), "rescaled OFT",
             "the tensor rescale is passed over", _ADAPTERS + "oft.py"),
        Rule("metadata-scale", WRONG, _states_scale, "alpha in the metadata",
             "it ignores lora_adapter_metadata: the scale is 1", _KEYS, is_mended=True),
        Rule("header-alpha", WRONG, _header_alpha, "alpha in the header",
             "it ignores the header's alpha: the scale is 1", _KEYS, is_mended=True),
        Rule("fused-and-split", WRONG, _fused_and_split, "fused and split at once",
             "a fused weight and its parts are both added, which doubles the change",
             "https://github.com/huggingface/diffusers/issues/13203"),
        Rule("boft-constraint", UNSURE, where(part=("oft",), on=lambda look, g:
             _is_butterfly(look, g) and "alpha" in g.parts), "BOFT with a constraint",
             "an alpha that is not 0 bounds less than in training",
             "https://github.com/Comfy-Org/ComfyUI/pull/15093"),
        Rule("wide-input", UNSURE, where(family=(models.FLUX1,), path=r"^(img_in|x_embedder)$",
             on=_is_wide), "an input layer of more channels than FLUX.1 has",
             "without reshape_weight it fits only a model that has as many, or is passed over",
             _ADAPTERS + "lora.py", is_mended=True),
        Rule("unknown-model", UNSURE, where(alike=lambda look, g:
             not (look.family.name or g.is_text)), "a model that is not known here",
             "whether its names are in the map is not known here", _KEYS),
    ),
    is_of_images=True, homes={"": "comfyui", models.SD: "kohya"},
)  # fmt: skip
