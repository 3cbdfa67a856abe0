"""ComfyUI: one adapter for each weight that its key map names; the rest is logged and passed over.

Alpha is applied everywhere, metadata nowhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain

from loratool.archs import families as archs
from loratool.dialects.programs import models
from loratool.dialects.programs.base import DROPPED, RAISES, UNSURE, WRONG, Hit, Program, Rule
from loratool.dialects.programs.grammar import Group
from loratool.dialects.programs.look import Look
from loratool.dialects.programs.where import drops_text_model, is_alone, numel, where
from loratool.frozen import replace
from loratool.lazy import regex

_HOME = "https://github.com/comfyanonymous/ComfyUI/blob/master/comfy/"
_KEYS, _ADAPTERS = _HOME + "lora.py", _HOME + "weight_adapter/"
_CONVERT = _HOME + "lora_convert.py"
_ISSUES = "https://github.com/comfyanonymous/ComfyUI/issues/"

# ------------------------------------------------------------------- the names in its key maps

_OWN = ("diffusion_model.", "lora_unet_")
"""How names of its own models may begin."""
_ANY = ("transformer.", "lycoris_", "")
_FLUX = {models.DIFFUSERS: (*_ANY, "lora_transformer_"), "uso": ("diffusion_model.",)}
_LUMINA = {models.DIFFUSERS: (*_ANY, "diffusion_model.")}
_BARE = {models.ORIGINAL: ("",)}
_BEGINS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    models.SD: {models.DIFFUSERS: ("lora_unet_", "lycoris_", "unet.", "")},
    models.SD3: {models.DIFFUSERS: ("transformer.", "base_model.model.", "lora_transformer_",
                                    "lycoris_")},
    **dict.fromkeys((models.FLUX1, models.FLUX2, "longcat_image", "ovis_image"), _FLUX),
    **dict.fromkeys((models.Z_IMAGE, models.KREA2), _LUMINA),
    "pixart": {models.DIFFUSERS: ("transformer.", "base_model.model.", "unet.base_model.model.")},
    "auraflow": {models.DIFFUSERS: ("transformer.",)},
    models.QWEN: {models.DIFFUSERS: _ANY},
    models.HIDREAM: {models.ORIGINAL: ("transformer.", "lycoris_")},
    "kandinsky5": {models.ORIGINAL: ("", "transformer.")},
    "ernie_image": {models.ORIGINAL: ("transformer.",)},
    "ace_step": {models.ORIGINAL: ("base_model.model.", "lycoris_")},
    **dict.fromkeys(("hidream_o1", models.LTX, "mochi", "omnigen2", "minimax_h3"), _BARE),
}  # fmt: skip
"""Model -> naming -> how names of it may begin besides."""
_LACKS = {
    models.FLUX1: regex(r"distilled_guidance_layer_"),
    models.FLUX2: regex(r"time_guidance_embed_|(single|double)_stream_modulation"),
    "longcat_image": regex(r"time_embed_"),
    "ovis_image": regex(r"transformer_blocks_\d+_ff_|timestep_embedder_|context_embedder_norm"),
}
"""Model -> what it has no names of diffusers for."""
# What trainers of HunyuanVideo call what its own model calls so today.
_OLD = (
    ("_mod.lin", "_mod.linear"), ("_attn.qkv", "_attn_qkv"), ("_attn.proj", "_attn_proj"),
    ("mlp.0", "mlp.fc1"), ("mlp.2", "mlp.fc2"), (".modulation.lin", ".modulation.linear"),
)  # fmt: skip
# What tells the two files whose names it changes first.
_CONTROL = ("img_in.lora_A.weight", "single_blocks.0.norm.key_norm.scale")
_WAN_FUN = "lora_unet__blocks_0_cross_attn_k.lora_down.weight"


def _is_known(look: Look, group: Group) -> bool:
    """False if the key map of the model has no such name."""
    if group.is_text:
        return _is_text_known(look.family.map, group)
    if group.prefix == "bundle_emb." or not look.family.name:
        return True
    if "_processor_" in group.flat or group.prefix == "lora_prior_unet_":
        return True  # XLabs, Stable Cascade
    if not group.prefix and _is_control(look):
        return True
    if group.prefix == "lora_unet__" and _WAN_FUN in look.tensors:
        group = replace(group, prefix=_OWN[1])
    known = archs.places("unet", group.flat, "weight", look.family.map)
    begins = {*_OWN, *chain.from_iterable(_BEGINS.get(look.family.name, {}).values())}
    return any(_has(look.family.name, p, group) for p in known) or (
        not known and group.prefix in begins
    )


def _is_control(look: Look) -> bool:
    """True for a control LoRA of FLUX.1's makers, whose names it changes first."""
    return all(key in look.tensors for key in _CONTROL)


def _has(family: str, place: archs.Place, group: Group) -> bool:
    """True if the map has this name for these weights of a family."""
    own = place.called("comfyui", 0, 0)
    if place.is_tensor and not place.names(own)[0].endswith(".weight"):  # it has the whole name
        return group.stem == f"diffusion_model.{place.names(own)[0]}"
    ways: list[tuple[str, tuple[str, ...]]] = [(own, _OWN)]
    if family not in _LACKS or not _LACKS[family].match(group.flat):
        ways += [(n, p) for n, p in _BEGINS.get(family, {}).items() if n in place.namings]
    if any(group.prefix in p and _is_called(group, place, n) for n, p in ways):
        return True
    is_old = family == models.HUNYUAN and group.prefix in ("diffusion_model.", "transformer.")
    return is_old and group.path in map(_old, place.names(own))


def _is_called(group: Group, place: archs.Place, naming: str) -> bool:
    """True if a naming has the module's very name for these weights."""
    names = [name.removesuffix(".weight") for name in place.names(naming)]
    return group.flat in map(archs.flatten, names) if group.is_flat else group.path in names


def _old(name: str) -> str:
    for today, then in _OLD:
        name = name.replace(today, then)
    return name


_CLIP = regex(r"text_model_encoder_layers_\d+_(mlp_fc[12]|self_attn_(q|k|v|out)_proj)$")
_LLM = regex(r"(layers_\d+_|embed_tokens$|norm$)")
_T5 = {"sd3": ("lora_te3_",), "flux1": ("lora_te2_", "lora_te3_"), "": ("lora_te1_",)}
"""Model -> how names of its T5 may begin; "" = of those that have no other encoder."""


def _is_text_known(family: str, group: Group) -> bool:
    if group.prefix == "text_encoders." or drops_text_model(Look({}), group):
        return True
    if group.flat == "text_projection":
        return group.prefix in ("lora_te1_", "lora_te2_", "lora_prior_te_")
    if group.flat.startswith(("encoder_block_", "shared")):
        begins = _T5.get(family, _T5[""]) if family else chain.from_iterable(_T5.values())
        return group.prefix in begins
    if _LLM.match(group.flat):
        return group.prefix == "lora_te_"
    others = ("lora_te3_", "text_encoder_3.")
    return _CLIP.match(group.flat) is not None and group.prefix not in others


# --------------------------------------------------------------------------------- its rules


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
    "0.19.3 (30860264, 2026-04-17), later names from its pull requests",
    (_KEYS, _ADAPTERS, _CONVERT),
    (
        Rule("boft-alpha", DROPPED, where(part=("oft",), on=lambda look, g:
             _is_butterfly(look, g) and "alpha" not in g.parts), "BOFT without alpha",
             "without an alpha tensor BOFT fails and its weight stays as it is",
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
        Rule("left-alone", RAISES, where(kind=("lora",), alike=lambda look, g:
             is_alone(look, g) and "up" in g.parts), "one factor alone",
             "where it finds a lora_B it takes the lora_A for granted", _ADAPTERS + "lora.py"),
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
