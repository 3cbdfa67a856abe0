"""diffusers: a converter for each model turns names into its own; what is left over is an error.

The rules were read from, and are compared by a test with, the functions of
``diffusers.loaders.lora_conversion_utils`` 0.42.1.  Rules of older versions say so.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from loratool.dialects.programs import models
from loratool.dialects.programs.base import DROPPED, RAISES, UNSURE, WRONG, Hit, Program, Rule
from loratool.dialects.programs.diffusers_spelled import FLUX_RULES, QWEN_RULES, is_converted
from loratool.dialects.programs.diffusers_text import TEXT_RULES
from loratool.dialects.programs.grammar import Group
from loratool.dialects.programs.look import Look, once
from loratool.dialects.programs.models import (
    ANIMA,
    FLUX1,
    FLUX2,
    HIDREAM,
    HUNYUAN,
    KREA2,
    LTX,
    LUMINA2,
    QWEN,
    SD,
    SD3,
    WAN,
    Z_IMAGE,
)
from loratool.dialects.programs.models import (
    DIFFUSERS as OWN,
)
from loratool.dialects.programs.where import (
    FACTORS,
    has_prefix,
    is_alone,
    is_of_language,
    lacks_alpha,
    language,
    numbered,
    where,
)

_HOME = "https://github.com/huggingface/diffusers/"
_FILES = _HOME + "blob/v0.42.1/src/diffusers/loaders/"
_CODE, _PIPELINES = _FILES + "lora_conversion_utils.py", _FILES + "lora_pipeline.py"
_ISSUES, _PULLS = _HOME + "issues/", _HOME + "pull/"

_KOHYA = ("lora_te_", "lora_te1_", "lora_te2_", "lora_unet_")
_PIPELINE = ("transformer.", "text_encoder.", "text_encoder_2.", "text_encoder_3.")
_OWN_ALONE = (
    "auraflow", "mochi", "cogview", "cogvideox", "kandinsky5", "sana", "bria_fibo2",
    "cosmos_predict2",
)  # fmt: skip
"""Models without a converter."""
_WITHOUT_LOADER = (
    "pixart", "omnigen2", "ovis_image", "longcat_image", "hunyuan_image",
    "hunyuan_video_15", "hidream_o1", "longcat_video",
)  # fmt: skip
"""Models whose pipelines load no LoRA, or that have none."""
_TAKES = {
    SD: ("unet.", "text_encoder.", "text_encoder_2.", ""),
    SD3: _PIPELINE,
    WAN: ("diffusion_model.", "lora_unet_", "transformer.", "transformer_2."),
    QWEN: ("diffusion_model.", "lora_unet_", "transformer."),
    Z_IMAGE: ("diffusion_model.", "lora_unet_", "transformer."),
    LUMINA2: ("diffusion_model.", "transformer."),
    KREA2: ("diffusion_model.", "base_model.model.", "transformer."),
    ANIMA: ("diffusion_model.", "transformer.", "text_conditioner."),
    LTX: ("diffusion_model.", "transformer.", "connectors."),
    HIDREAM: ("diffusion_model.", "transformer."),
    HUNYUAN: ("diffusion_model.", "transformer.", ""),
    "ernie_image": ("diffusion_model.", "base_model.model.", "transformer."),
    **dict.fromkeys(("flux3", "minimax_h3"), ("diffusion_model.", "transformer.")),
    "ideogram4": ("diffusion_model.", "conditional_transformer.", "transformer."),
    "ace_step": ("base_model.model.", "transformer."),
    **dict.fromkeys(_OWN_ALONE, ("transformer.",)),
}
"""Model -> how names may begin; FLUX has rules of its own."""
_CONVOLUTIONS = (
    r"resnets_\d+_conv(1|2|_shortcut)$|samplers_0_conv$|^conv_(in|out)$"
    r"|_0_(in_layers_2|out_layers_3|skip_connection|op)$"
)
_DOTTED = r"diffusion_model\.|base_model\.model\."
_STRICT = (QWEN, Z_IMAGE, WAN, LUMINA2, KREA2)
"""Models whose converters stop at what is left over."""
_ALGORITHMS = ("loha", "oft", "glora", "ia3", "tlora", "norm", "set", "tucker")
_WAN_BLOCK = {f"{attn}_attn_{leaf}" for attn in ("self", "cross") for leaf in "qkvo"} | {
    "ffn_0", "ffn_2"}  # fmt: skip
_WAN_MODULE = rf"blocks_\d+_({'|'.join(_WAN_BLOCK)}|cross_attn_[kv]_img)"
_OWN_ALPHA = (SD3, WAN, FLUX2, LUMINA2, KREA2, HUNYUAN, "ideogram4", "ace_step", "minimax_h3")
_LEAVES_ALPHA = (ANIMA, LTX, HIDREAM, "ernie_image", "flux3", *_OWN_ALONE)
_LUMINA_BLOCK = {"attention_qkv", "attention_out", *(f"feed_forward_w{i}" for i in (1, 2, 3))}


# ------------------------------------------------------------------ Stable Diffusion


@once
def _is_kohya(look: Look) -> bool:
    """True if every name begins as kohya's do; else none of them is converted."""
    names = [k for k in look.tensors if "dora_scale" not in k]
    return bool(names) and all(name.startswith(_KOHYA) for name in names)


def _leftovers(look: Look) -> Iterable[Hit]:
    """What the converter of kohya's names does not take."""
    if look.family.name not in (SD, "") or not _is_kohya(look):
        return []
    names = [
        key for g in look.groups for key, part in g.keys.items()
        if part not in (*FACTORS, "dora") or "down" not in g.parts or "up" not in g.parts
    ]  # fmt: skip
    return [Hit(tuple(names))] if names else []


def _is_flattened(_: Look, group: Group) -> bool:
    """True where a factor has fewer dimensions than the weight of a convolution."""
    return min(len(group.shape("down")), len(group.shape("up"))) < 4


def _without_lora(look: Look) -> Iterable[Hit]:
    """Names that are not converted and have no "lora" in them."""
    if look.family.name not in (SD, SD3, "") or _is_kohya(look) or not look.is_of_images:
        return []
    names = [k for k in look.tensors if "lora" not in k and "dora_scale" not in k]
    return [Hit(tuple(names))] if names else []


def _both_namings(look: Look) -> Iterable[Hit]:
    if look.family.name != SD:
        return []
    kohya = [(g, look.naming_of(g)) for g in look.groups if g.prefix == "lora_unet_"]
    original = tuple(g.stem for g, naming in kohya if naming == models.ORIGINAL)
    return [Hit(original)] if any(naming == OWN for _, naming in kohya) and original else []


# ----------------------------------------------------------------------- other models


@once
def _is_first_hunyuan(look: Look) -> bool:
    """True if names are converted: as Tencent's own code spells them, ComfyUI's is another."""
    return any("img_attn_qkv" in key for key in look.tensors)


def _hunyuan_down(look: Look, group: Group) -> bool:
    return not group.uses_letters and _is_first_hunyuan(look)


def _has_own_down(look: Look, group: Group) -> bool:
    """True for its own names with factors as other programs call them, which nothing converts."""
    is_taken = look.family.name in (QWEN, Z_IMAGE) and is_converted(look)
    return not (group.uses_letters or is_taken or look.family.name in (SD, FLUX1, FLUX2))


def _own_alpha(look: Look, group: Group) -> bool:
    """True where an alpha beside its own names is left over."""
    return group.uses_letters or look.family.name != FLUX2


def _has_own_names(look: Look, group: Group) -> bool:
    """True for its own names of modules behind what stands before the original ones."""
    return look.naming_of(group) == OWN


def _is_left_over(look: Look, group: Group) -> bool:
    """The same, where the converter runs."""
    family = look.family.name
    runs = group.prefix == "diffusion_model." or family in (FLUX2, KREA2)
    return runs and _has_own_names(look, group) and (family != FLUX2 or group.uses_letters)


def _is_foreign(look: Look, group: Group) -> bool:
    """A name that no converter of the model takes and that is not the model's."""
    takes = _TAKES.get(look.family.name)
    if takes is None:
        return False
    if look.family.name == SD and _is_kohya(look):
        return False
    if look.family.name == HUNYUAN and not _is_first_hunyuan(look):
        return group.prefix != "transformer." or look.naming_of(group) != OWN
    if look.family.name == "ace_step" and group.prefix == "base_model.model.":
        return not any("q_proj" in key or "k_proj" in key for key in look.tensors)
    if group.prefix == "" and look.family.name in (QWEN, Z_IMAGE):
        return not is_converted(look)
    return group.prefix not in takes or (
        group.prefix in ("transformer.", "unet.") and look.naming_of(group) == models.ORIGINAL
        and look.family.name not in (HUNYUAN, LTX)
    )  # fmt: skip


def _partial(family: str, prefix: str, block: str, needed: set[str]) -> Rule:
    """A converter that takes every module of a block for granted."""
    pattern = re.compile(rf"({block}_\d+)_(.+)")

    def find(look: Look) -> Iterable[Hit]:
        if look.family.name != family or not has_prefix(look, prefix):
            return []
        blocks: dict[str, set[str]] = {}
        for group in look.groups:
            if found := pattern.fullmatch(group.flat):
                blocks.setdefault(found[1], set()).add(found[2])
        lost = {b: needed - leaves for b, leaves in blocks.items() if needed - leaves}
        stems = [g.stem for g in look.groups if g.flat.startswith(tuple(f"{b}_" for b in lost))]
        return [Hit(tuple(stems))] if lost else []

    return Rule(
        f"partial-{family}",
        RAISES,
        find,
        "not every module of a block",
        "its converter takes all of them for granted: KeyError",
        _CODE,
        is_mended=True,
    )


def _mixed_ranks(look: Look) -> Iterable[Hit]:
    groups = [g for g in look.groups if g.uses_letters and "down" in g.parts]
    ranks = {g.shape("down")[:1] for g in groups}
    if len(ranks) < 2 or "lora_adapter_metadata" in look.metadata:
        return []
    first = groups[0].shape("down")[:1]
    return [Hit(tuple(g.stem for g in groups if g.shape("down")[:1] != first))]


def _is_lower(_: Look, group: Group) -> bool:
    """True for a module of fewer rows than columns."""
    return 0 < next(iter(group.shape("up")), 0) < next(iter(group.shape("down")[1:]), 0)


def _norm_alpha(look: Look, group: Group) -> bool:
    return "down" not in group.parts or group.flat == "head_head"


_SDS = (
    Rule("leftover", RAISES, _leftovers, "tensors that are not renamed",
         "only lora_down, lora_up and alpha are renamed; anything else is an error",
         _ISSUES + "11943", is_mended=True),
    Rule("flat-conv", RAISES, where(family=(SD, ""), path=_CONVOLUTIONS, kind=("lora",),
         on=_is_flattened), "a convolution's factors of two dimensions",
         "it makes convolutions of the kernel's size: sizes that do not fit", _PIPELINES,
         is_mended=True),
    Rule("no-lora-in-name", RAISES, _without_lora, 'names without "lora"',
         "every name that is not converted must contain lora", _PIPELINES, is_mended=True),
    Rule("sgm-beside-own", DROPPED, _both_namings, "names of two kinds",
         "beside its own names those of the original code are deleted", _CODE, is_mended=True),
)  # fmt: skip
_OTHERS = (
    Rule("algorithm", RAISES, where(family=_STRICT, kind=_ALGORITHMS), "anything but LoRA",
         "its converters know lora_A and lora_B alone", _CODE, is_mended=True),
    Rule("lokr", RAISES, where(family=(QWEN, WAN, LUMINA2, KREA2), kind=("lokr",)), "LoKr",
         "its converter knows lora_A and lora_B alone", _CODE, is_mended=True),
    Rule("lokr-old", RAISES, where(family=(FLUX2, Z_IMAGE), kind=("lokr",)), "LoKr",
         "its converter knew lora_A and lora_B alone", _PULLS + "13250", until="0.42"),
    Rule("full", RAISES, where(family=(QWEN, Z_IMAGE, LUMINA2, KREA2), part=("diff", "diff_b")),
         "whole differences", "its converter knows lora_A and lora_B alone", _CODE),
    Rule("own-diff", RAISES, where(part=("diff", "diff_b", "norm"), prefix=r"transformer(_2)?\.",
         on=lambda look, _: look.family.name not in ("", FLUX1, SD, SD3)),
         "differences behind transformer.",
         "a name without lora in it is an error", _PIPELINES),
    _partial(LUMINA2, "diffusion_model.", "(?:layers|noise_refiner|context_refiner)",
             _LUMINA_BLOCK),
    _partial(WAN, "lora_unet_", "blocks", _WAN_BLOCK),
    Rule("wan-alpha", RAISES, where(family=(WAN,), prefix="diffusion_model.",
         path=r"norm|^head_head$", part=("alpha",), alike=_norm_alpha),
         "alpha of norms or the head", "it is left over: ValueError", _CODE, is_mended=True),
    Rule("wan-no-alpha", RAISES, where(family=(WAN,), prefix="lora_unet_", kind=("lora",),
         alike=lacks_alpha), "no alpha", "its converter takes alpha for granted: KeyError", _CODE,
         is_mended=True),
    Rule("wan-vace", RAISES, where(family=(WAN,), path=r"^vace_blocks_"), "VACE's blocks",
         "its converter does not know them: ValueError", _CODE),
    Rule("wan-animate", RAISES, where(family=(WAN,), prefix="diffusion_model.",
         path=r"^(face_adapter_fuser_blocks|face_encoder|pose_patch_embedding)"),
         "Wan-Animate's face and pose", "its converter does not know them: ValueError", _CODE,
         is_mended=True),
    Rule("wan-diff", DROPPED, where(family=(WAN,), prefix="diffusion_model.",
         path=r"norm|modulation|patch_embedding", part=("diff", "diff_b")),
         "differences of norms and modulations", "they are passed over, also where they are not 0",
         _CODE),
    Rule("krea-alpha", RAISES, where(family=(KREA2,), prefix=_DOTTED,
         part=("alpha",)), "alpha", "it is left over: ValueError", _CODE, is_mended=True),
    Rule("krea-numbered", RAISES, where(family=(KREA2,), kind=("lora",),
         prefix=_DOTTED, alike=numbered), "lora_down and lora_up",
         "they are left over: ValueError", _CODE, is_mended=True),
    Rule("alpha-left", RAISES, where(family=_LEAVES_ALPHA, part=("alpha",),
         alike=lambda _, g: "lora" not in g.stem), "alpha",
         "a name without lora in it is an error", _PIPELINES, is_mended=True),
    Rule("alpha-beside-own", RAISES, where(family=_OWN_ALPHA, prefix=r"transformer\.",
         part=("alpha",), alike=_own_alpha), "alpha beside its own names",
         "a name without lora in it is an error", _PIPELINES, is_mended=True),
    Rule("down-of-own", RAISES, where(prefix=r"transformer(_2)?\.", kind=("lora",),
         alike=_has_own_down), "lora_down and lora_up",
         "they are not converted, and no lora_B tells a rank: IndexError",
         _FILES + "peft.py", is_mended=True),
    Rule("own-left", RAISES, where(family=(WAN, FLUX2, KREA2, "minimax_h3"), prefix=_DOTTED,
         on=_is_left_over), "its own names where it takes the original ones",
         "they are left over: ValueError", _CODE, is_mended=True),
    Rule("own-lost", DROPPED, where(family=(ANIMA,), prefix=r"diffusion_model\.",
         path=r"^transformer_blocks_"), "its own names where it takes the original ones",
         "they are renamed as if they were those, and fit nothing", _CODE, is_mended=True),
    Rule("flux-own-left", RAISES, where(family=(FLUX1,), prefix=r"base_model\.model\.",
         on=_has_own_names), "its own names where it takes the original ones",
         "the original ones are taken for granted: KeyError", _CODE, is_mended=True),
    Rule("hunyuan-down", RAISES, where(family=(HUNYUAN,), kind=("lora",), alike=_hunyuan_down),
         "lora_down and lora_up", "it cuts all but lora_A in three, and no lora_B tells a rank",
         _CODE, is_mended=True),
    Rule("hunyuan-refiner", RAISES, where(family=(HUNYUAN,), path=r"self_attn_qkv$",
         alike=lambda look, _: _is_first_hunyuan(look)), "attention of the text's refiner",
         "it cuts lora_A in three as well: its ranks are others", _CODE, is_mended=True),
    Rule("lumina-numbered", RAISES, where(family=(LUMINA2,), kind=("lora",),
         prefix=r"diffusion_model\.", alike=numbered), "lora_down and lora_up",
         "it takes lora_A for granted: KeyError", _CODE, is_mended=True),
    Rule("ideogram-top", RAISES, where(family=("ideogram4",), prefix=r"diffusion_model\.",
         path=r"^(?!layers_\d)"), "modules outside of the layers", "they are left over: ValueError",
         _CODE, is_mended=True),
    Rule("wan-left", RAISES, where(family=(WAN,), prefix="lora_unet_", on=lambda _, g:
         re.fullmatch(_WAN_MODULE, g.flat) is None), "modules that it does not convert",
         "its converter of flat names knows attention and ffn alone", _CODE, is_mended=True),
    *QWEN_RULES,
    Rule("mochi-last", DROPPED, where(family=("mochi",), prefix=r"transformer\.",
         path=r"_norm1_context_linear$", on=_is_lower), "the last block's norm1_context.linear",
         "its name there is norm1_context.linear_1: the keys are unexpected, with a warning",
         _HOME + "blob/v0.42.1/src/diffusers/models/transformers/transformer_mochi.py#L130",
         is_mended=True),
    Rule("hunyuan-final", WRONG, where(family=(HUNYUAN,), path=r"^final_layer_adaLN_modulation_1$"),
         "the last modulation", "both factors' halves are swapped where lora_B's must be", _CODE,
         is_mended=True),
    Rule("foreign", DROPPED, where(on=_is_foreign), "names that it does not convert",
         "no name begins as the parts of the pipeline are called: nothing is loaded from them",
         _PIPELINES, is_mended=True),
)  # fmt: skip
_ALL = (
    Rule("one-factor", RAISES, where(kind=("lora",), alike=is_alone), "one factor alone",
         "a lora_A without its lora_B is an error", _CODE),
    Rule("dora", WRONG, where(alike=lambda _, g: any(k.endswith("dora_scale") for k in g.keys)),
         "DoRA", "dora_scale is deleted with a warning and the plain LoRA is added",
         _PULLS + "9547"),
    Rule("magnitude", WRONG, where(part=("magnitude",)), "DoRA of ai-toolkit",
         "the magnitudes are passed over and the plain LoRA is added", _PIPELINES),
    Rule("no-loader", UNSURE, where(alike=lambda look, _: look.family.map in _WITHOUT_LOADER),
         "a model whose pipelines load no LoRA",
         "they have no load_lora_weights; a model's load_lora_adapter takes its own names",
         _PIPELINES),
    language("no part of its pipelines is called so: nothing is loaded", _PIPELINES),
    Rule("unknown-model", UNSURE, where(alike=lambda look, g: not (
         look.family.name or g.is_text or is_of_language(look))
         and g.prefix not in ("transformer.", "unet.")), "a model that is not known here",
         "other names than its own are converted by some of its loaders alone", _CODE),
    Rule("mixed-ranks", WRONG, _mixed_ranks, "mixed ranks without metadata",
         "the first rank was every module's lora_alpha", _PULLS + "14409", until="0.42"),
)  # fmt: skip

DIFFUSERS = Program(
    "diffusers", "diffusers", "0.42.1", (_CODE, _PIPELINES),
    (*_SDS, *FLUX_RULES, *TEXT_RULES, *_OTHERS, *_ALL), is_of_images=True,
    homes={"": "diffusers", SD: "kohya"},
)  # fmt: skip
