"""AUTOMATIC1111's webui: names up to their first dot are looked for among the model's modules.

What is not found is passed over; a module that is found, and whose tensors make none of its
algorithms, stops the file.  Stable Diffusion 3 has a way of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from loratool.dialects.programs import models
from loratool.dialects.programs.base import DROPPED, RAISES, UNSURE, WRONG, Hit, Program, Rule, Test
from loratool.dialects.programs.grammar import Group
from loratool.dialects.programs.look import Look, once
from loratool.dialects.programs.models import SD, SD3
from loratool.dialects.programs.where import drops_text_model, language, lettered, numel, where
from loratool.lazy import regex

_HOME = (
    "https://github.com/AUTOMATIC1111/stable-diffusion-webui/blob/"
    "82a973c04367123ae98bd9abdf80d9eda9b910e2/"
)
_LORA = _HOME + "extensions-builtin/Lora/"
_NETWORKS, _MODULE = _LORA + "networks.py", _LORA + "network.py"
_SD3_MAP = _HOME + "modules/models/sd3/sd3_model.py#L86"

_UNET = regex(
    r"conv_(in|out)$|time_embedding_linear_\d|mid_block_(attentions|resnets)_\d+_"
    r"|(down|up)_blocks_\d+_((attentions|resnets)_\d+_|(down|up)samplers_0_conv)"
    r"|(input_blocks|output_blocks)_\d|middle_block_\d|time_embed_\d|label_emb_\d|out_[02]$"
)
"""Names of the U-Net that it has, or turns into those that it has."""
_CLIP = {
    "lora_te_": regex(r"text_model_encoder_layers_\d+_"),
    "lora_te1_": regex(r"text_model_"),
    "lora_te2_": regex(r"text_model_encoder_layers_\d+_(self_attn|mlp)_"),
}
_OPEN_CLIP = 1024  # columns of Stable Diffusion 2's text encoder, which is torch's attention
_ATTENTION = regex(r"(?P<layer>.+_self_attn)_(q|k|v|out)_proj")
_SD3_PART = regex(r"transformer_blocks_\d+_attn_(to_[qkv]|to_out_0)")
_SD3_QKV = regex(r"(?P<layer>transformer_blocks_\d+_attn)_to_[qkv]")
_BESIDE = ("diff_b", "bias", "set", "reshape", "rescale", "scalar")
"""Parts that none of its algorithms but OFT (rescale) and whole differences (diff_b) read."""


def _is_found(look: Look, group: Group) -> bool:
    """True if a model of its has a module of that name."""
    if look.family.name == SD3:
        named = look.naming_of(group) == models.ORIGINAL
        return named if group.is_flat else _is_mapped(group)
    if group.is_text:
        names = _CLIP.get(group.prefix)
        return names is not None and names.match(group.flat) is not None
    return group.prefix == "lora_unet_" and _UNET.match(group.flat) is not None


def _is_mapped(group: Group) -> bool:
    """True for what is in its map of diffusers' names of Stable Diffusion 3."""
    is_plain = all(re.search(r"\.lora_[AB]\.weight$", k) for k in group.of("down", "up"))
    return group.prefix == "transformer." and is_plain and bool(_SD3_PART.fullmatch(group.flat))


_HADA = {f"hada_w{i}_{leaf}" for i in "12" for leaf in "ab"}
_GLORA = {f"{leaf}{i}.weight" for leaf in "ab" for i in "12"} | {"alpha"}
_KRON = [{f"lokr_w{i}{a}", f"lokr_w{i}{b}"} for i in "12" for a, b in (("", ""), ("_a", "_b"))]
_TAKES = (
    {"lora_up.weight", "lora_down.weight"}, {"lora_A.weight", "lora_B.weight"}, _HADA,
    {"weight", "on_input"}, *(one | two for one in _KRON[:2] for two in _KRON[2:]), {"diff"},
    {"w_norm", "b_norm"}, _GLORA, {"oft_blocks"},
)  # fmt: skip
"""What each of its algorithms takes, by the ends of names."""


def _has_algorithm(group: Group) -> bool:
    """True if the tensors of a module are all that one of its algorithms takes."""
    ends = {key[len(group.stem) + 1 :] for key in group.keys}
    return any(needed <= ends for needed in _TAKES)


_INCOMPLETE = {
    "lora": "one factor alone", "norm": "half of a norm", "glora": "GLoRA without alpha",
    "tlora": "T-LoRA", "oft": "OFT of PEFT or OneTrainer", "ia3": "IA³ without on_input",
    "full": "biases alone", "set": "whole tensors",
}  # fmt: skip


def _without_algorithm(look: Look) -> Iterable[Hit]:
    whole = {g.stem for g in look.groups if _has_algorithm(g)}
    for group in look.groups:
        if not _is_found(look, group) or group.stem in whole:
            continue
        if "" in group.parts and group.stem.partition(".")[0] in whole:
            continue
        yield Hit((group.stem,), _INCOMPLETE.get(group.kind, "tensors of no algorithm"))


def _bundles(look: Look) -> Iterable[Hit]:
    """Bundled embeddings of several tensors, which it cannot tell apart."""
    found: dict[str, set[str]] = {}
    bundled = [key for key in look.tensors if key.startswith("bundle_emb.")]
    for key in bundled:
        name, _, part = key.removeprefix("bundle_emb.").partition(".")
        found.setdefault(name, set()).add(part)
    names = tuple(
        f"bundle_emb.{name}" for name, parts in found.items()
        if len(parts) > 1 and not {"clip_l", "clip_g"} <= parts
        and not any(p.startswith("string_to_param.") for p in parts)
    )  # fmt: skip
    keys = tuple(k for k in bundled if k.startswith(tuple(f"{n}." for n in names)))
    return [Hit(keys)] if names else []


def _of_sd(look: Look) -> bool:
    return look.family.name in (SD, "")


def _sd(test: Test) -> Test:
    return lambda look: test(look) if _of_sd(look) else []


def _is_unknown(look: Look, group: Group) -> bool:
    """A flat name that no model of its has; of one that is not known the U-Net may be another."""
    if not group.is_flat or "embedding" in group.parts or drops_text_model(look, group):
        return False
    is_open = look.family.name == "" and group.prefix == "lora_unet_"
    return not is_open and not _is_found(look, group)


@once
def _is_xl(look: Look) -> bool:
    """True for SDXL: a second text encoder, several transformer blocks in a row."""
    return any(
        g.prefix == "lora_te2_" or re.search(r"_transformer_blocks_[1-9]", g.flat)
        for g in look.groups
    )


def _is_open_clip(group: Group) -> bool:
    return group.prefix == "lora_te2_" or (
        group.prefix == "lora_te_" and group.shape("down")[1:2] == (_OPEN_CLIP,)
    )


def _split_attention(look: Look) -> Iterable[Hit]:
    """The attention of torch takes a change of all four projections, or none."""
    found: dict[tuple[str, str], list[Group]] = {}
    for group in look.groups:
        if _is_open_clip(group) and (match := _ATTENTION.fullmatch(group.flat)):
            found.setdefault((group.prefix, match["layer"]), []).append(group)
    names = tuple(g.stem for layer in found.values() if len(layer) < 4 for g in layer)
    return [Hit(names)] if names else []


def _split_qkv(look: Look) -> Iterable[Hit]:
    found: dict[str, list[Group]] = {}
    for group in look.groups if look.family.name == SD3 else ():
        if _is_mapped(group) and (match := _SD3_QKV.fullmatch(group.flat)):
            found.setdefault(match["layer"], []).append(group)
    names = tuple(g.stem for layer in found.values() if len(layer) < 3 for g in layer)
    return [Hit(names)] if names else []


def _short(look: Look) -> Iterable[Hit]:
    """Names with fewer than two dots."""
    names = tuple(k for k in look.tensors if k.count(".") < 2) if look.family.name == SD3 else ()
    return [Hit(names)] if names else []


def _sd3_alpha(look: Look) -> Iterable[Hit]:
    named = [g for g in look.groups if look.family.name == SD3 and _is_mapped(g)]
    names = tuple(k for g in named for k in g.of("alpha"))
    return [Hit(names)] if names else []


def _unread(look: Look) -> Iterable[Hit]:
    """Tensors beside those of an algorithm."""
    names: list[str] = []
    for group in look.groups:
        if not group.parts.isdisjoint(("", *_BESIDE)) and _is_found(look, group):
            read = {"full": ("diff_b",), "oft": ("rescale",)}.get(group.kind, ())
            names += group.of("", *(p for p in _BESIDE if p not in read))
    return [Hit(tuple(names))] if names else []


def _is_new_glora(_: Look, group: Group) -> bool:
    """LyCORIS' order of today, or a convolution."""
    shape = next((group.tensors[k].shape for k in group.keys if k.endswith(".a1.weight")), ())
    return len(shape) > 2 or shape[:1] > shape[1:]


def _is_by_rows(_: Look, group: Group) -> bool:
    shape = group.shape("dora")
    return len(shape) > 1 and shape[0] > 1 and numel(shape) == shape[0]


RULES = (
    Rule("no-algorithm", RAISES, _without_algorithm, "",
         "a module that it finds, with tensors that make none of its algorithms, stops the file",
         _NETWORKS + "#L254"),
    Rule("model-itself", RAISES, _sd(where(prefix=r"diffusion_model\.")), "ComfyUI's names",
         "the name up to the dot is that of the whole U-Net, which no algorithm fits",
         _NETWORKS + "#L189", is_mended=True),
    Rule("sd3-short", RAISES, _short, "names with one dot",
         "of Stable Diffusion 3 it takes the last two parts of every name off: ValueError",
         _NETWORKS + "#L186"),
    Rule("bundle", RAISES, _bundles, "bundled embeddings of several tensors",
         "it takes one tensor, or clip_l with clip_g", _HOME
         + "modules/textual_inversion/textual_inversion.py#L301"),
    Rule("other-model", DROPPED, where(alike=lambda look, _: look.family.name not in (SD, SD3, "")),
         "a model that it does not have", "it runs Stable Diffusion 1, 2, XL and 3 alone",
         _HOME + "modules/sd_models_config.py#L12"),
    Rule("dotted", DROPPED, _sd(where(alike=lambda _, g: not g.is_flat and g.prefix not in
         ("diffusion_model.", "bundle_emb."))), "names with dots",
         "a name is looked for up to its first dot", _NETWORKS + "#L189", is_mended=True),
    Rule("text-model", DROPPED, _sd(where(alike=drops_text_model)),
         "text encoder without text_model in its names",
         "it looks for text_model_encoder_layers", _NETWORKS + "#L100", is_mended=True),
    Rule("unknown-name", DROPPED, _sd(where(on=_is_unknown)), "names that it does not have",
         "no module of the model is called so", _NETWORKS + "#L56", is_mended=True),
    Rule("xl-upsampler", DROPPED, _sd(where(prefix="lora_unet_",
         path=r"^up_blocks_0_upsamplers_0_conv$", alike=lambda look, _: _is_xl(look))),
         "an upsampler of SDXL",
         "its name becomes that of Stable Diffusion 1", _NETWORKS + "#L98", is_mended=True),
    Rule("text-attention", DROPPED, _sd(_split_attention), "some of an attention's projections",
         "OpenCLIP's attention takes changes of q, k, v and out together, or none",
         _NETWORKS + "#L490"),
    Rule("sd3-text", DROPPED, where(family=(SD3,), alike=lambda _, g: g.is_text),
         "Stable Diffusion 3's text encoders", "their names are not among the model's",
         _NETWORKS + "#L202"),
    Rule("sd3-names", DROPPED, where(family=(SD3,), on=lambda look, g: not (
         g.is_text or _is_found(look, g))), "names that are not in its map",
         "its map has the image half's attention alone", _SD3_MAP),
    Rule("sd3-alpha", DROPPED, _sd3_alpha, "alpha",
         "its name is not in the map: the scale is 1", _NETWORKS + "#L186", is_mended=True),
    Rule("sd3-attention", DROPPED, _split_qkv, "some of an attention's projections",
         "changes of q, k and v are added together, or none", _NETWORKS + "#L516"),
    Rule("unread", DROPPED, _unread, "tensors beside those of its algorithm",
         "biases are read beside whole differences alone", _LORA + "network_full.py#L17"),
    Rule("glora", DROPPED, where(kind=("glora",), on=_is_new_glora), "GLoRA as LyCORIS has it now",
         "it multiplies in the older order, which fails, and passes the module over",
         _LORA + "network_glora.py#L31"),
    Rule("dora-1d", DROPPED, where(part=("dora",), on=lambda _, g: len(g.shape("dora")) == 1
         and g.shape("dora") != g.shape("down")[1:2]), "DoRA of one dimension",
         "it is divided by the lengths of columns, which fails, and the module is passed over",
         _MODULE + "#L182"),
    Rule("letters-alpha", WRONG, where(kind=("lora",), part=("alpha",), alike=lambda look, g:
         lettered(look, g) and g.is_flat), "alpha beside lora_A",
         "only the factors are kept: the scale is 1", _LORA + "network_lora.py#L16",
         is_mended=True),
    Rule("letters-dora", WRONG, where(kind=("lora",), part=("dora", "magnitude"),
         alike=lambda look, g: lettered(look, g) and g.is_flat), "DoRA beside lora_A",
         "only the factors are kept: the plain LoRA is added", _LORA + "network_lora.py#L16"),
    Rule("glora-scale", WRONG, where(kind=("glora",), on=lambda look, g: not
         _is_new_glora(look, g)), "GLoRA", "alpha is passed over: the scale is 1",
         _MODULE + "#L170"),
    Rule("dora-rows", WRONG, where(part=("dora",), on=_is_by_rows), "DoRA of rows",
         "it divides by the lengths of columns", _MODULE + "#L182"),
    Rule("ia3-conv", UNSURE, where(kind=("ia3",), on=lambda _, g: len(g.shape("weight")) > 2),
         "IA³ of a convolution", "of a convolution's outputs it fails and is passed over",
         _LORA + "network_ia3.py#L26"),
    language("the names are of no model that it has", _NETWORKS + "#L206"),
    Rule("unknown-model", UNSURE, where(prefix="lora_unet_", on=lambda look, g:
         not look.family.name and not _is_found(look, g)), "a model that it may not have",
         "the names are of no model that is known", _NETWORKS + "#L206"),
)  # fmt: skip
WEBUI = Program(
    "webui", "AUTOMATIC1111 webui", "1.10.1 (82a973c0)",
    (_NETWORKS, _MODULE, _LORA + "network_lora.py"), RULES, also=("a1111",),
    is_of_images=True, homes={"": "kohya", SD3: "diffusers"},
)  # fmt: skip
