"""How files of image models name tensors: prefix, module and part, whoever wrote them.

Nothing is resolved here: a rule of a program sees what the program sees, a name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache

from loratool.frozen import Frozen
from loratool.lazy import regex

_PARTS = (
    (r"lora_down\.weight|lora_A(\.[^.]+)?\.weight|lora_A(\.default)?", "down"),
    (r"lora_up\.weight|lora_B(\.[^.]+)?\.weight|lora_B(\.default)?", "up"),
    (r"(lora|lora_linear_layer)\.down\.weight", "down"),
    (r"(lora|lora_linear_layer)\.up\.weight", "up"),
    (r"lora_mid\.weight", "mid"),
    (r"lora_B(\.[^.]+)?\.bias", "bias"),
    (r"dora_scale|lora_magnitude_vector(\.[^.]+)?(\.weight)?", "dora"),
    (r"magnitude", "magnitude"),
    (r"alpha", "alpha"),
    (r"hada_(w[12]_[ab]|t[12])", "hada"),
    (r"lokr_t[12]", "lokr_core"),
    (r"lokr_w[12](_[ab])?", "lokr"),
    (r"[ab][12]\.weight|bm\.weight", "glora"),
    (r"oft_blocks", "oft"),
    (r"oft_R\.(weight|scaled_oft(\.weight)?)", "oft_R"),
    (r"rescale", "rescale"),
    (r"[pq]_layer\.weight|lambda_layer", "tlora"),
    (r"on_input", "on_input"),
    (r"diff|diff_m", "diff"),
    (r"diff_b", "diff_b"),
    (r"set_weight", "set"),
    (r"reshape_weight", "reshape"),
    (r"w_norm|b_norm", "norm"),
    (r"scalar", "scalar"),
    (r"weight", "weight"),
)
"""What a key ends in behind the module and a dot -> the part that it is."""
_ENDS = [(regex(rf"(?:.*\.)?(?P<end>{end})"), part) for end, part in _PARTS]
_THREE = ("lora", "lora_linear_layer", "lora_A", "lora_B", "lora_magnitude_vector", "oft_R")
"""What a part of three words begins with; the others have one or two."""
_OLD = regex(r"(?P<stem>.+)(?P<end>_lora[12]?\.(?P<part>down|up)\.weight)")
_SET = regex(r"(?P<stem>.+\.(query|key)_norm)\.(?P<end>scale)")
_PREFIXES = (
    "bundle_emb.", "lora_unet__", "lora_unet_", "lora_te1_", "lora_te2_", "lora_te3_", "lora_te_",
    "lora_transformer_", "lora_prior_unet_", "lora_prior_te_", "lycoris_",
    "Hunyuan_video_I2V_lora_", "base_model.model.transformer.", "base_model.model.text_encoder.",
    "base_model.model.", "transformer.base_model.model.", "transformer.diffusion_model.",
    "transformer_2.", "transformer.", "conditional_transformer.", "unet.base_model.model.", "unet.",
    "text_encoder_2.", "text_encoder_3.", "text_encoder.", "text_encoders.",
    "model.diffusion_model.", "diffusion_model.", "text_conditioner.", "connectors.", "prior.",
)  # fmt: skip
"""The longer of two that begin alike comes first."""
_PREFIX = regex("|".join(map(re.escape, _PREFIXES)))

_ANY = ("", "transformer.", "base_model.model.", "base_model.model.transformer.", "prior.")
"""Prefixes that other models have too."""


class Tensor(Frozen):
    """Type and shape."""

    dtype: str
    shape: tuple[int, ...]


class Group(Frozen):
    """The tensors of one module.

    Attributes:
        stem: the name without what the parts end in.
        prefix: how it begins, "" where modules have no prefix.
        keys: key -> its part, "" where the ending says nothing.
        tensors: key of the file -> type and shape.
        flat: the module without its prefix, with underscores for dots.
        parts: all of its parts.
        kind: the algorithm: what decides is the part that no other one has.
        is_text: of a text encoder.
    """

    stem: str
    prefix: str
    keys: Mapping[str, str]
    tensors: Mapping[str, Tensor]
    flat: str
    parts: frozenset[str]
    kind: str
    is_text: bool

    @property
    def path(self) -> str:
        """The module without its prefix, as spelled."""
        return self.stem[len(self.prefix) :]

    @property
    def is_flat(self) -> bool:
        """True if its dots are lost."""
        return self.prefix.endswith("_")

    @property
    def ends(self) -> tuple[str, ...]:
        """What its keys have behind the stem."""
        return tuple([key[len(self.stem) :] for key in self.keys])

    def of(self, *parts: str) -> tuple[str, ...]:
        """Keys of some of its parts."""
        return tuple(key for key, part in self.keys.items() if part in parts)

    def shape(self, part: str) -> tuple[int, ...]:
        """Shape of the first tensor of a part, () if there is none."""
        return next((self.tensors[key].shape for key in self.of(part)), ())

    @property
    def uses_letters(self) -> bool:
        """True for ``lora_A`` and ``lora_B``, False for ``lora_down`` and ``lora_up``."""
        return any("lora_A" in key or "lora_B" in key for key in self.keys)

    @property
    def is_of_images(self) -> bool:
        """True if the prefix is one of image models' files."""
        return self.prefix not in _ANY


_KINDS = (
    ("on_input", "ia3"), ("tlora", "tlora"), ("glora", "glora"), ("hada", "loha"),
    ("lokr", "lokr"), ("lokr_core", "lokr"), ("oft", "oft"), ("oft_R", "oft"), ("mid", "tucker"),
    ("down", "lora"), ("up", "lora"), ("diff", "full"), ("diff_b", "full"), ("norm", "norm"),
    ("set", "set"), ("reshape", "set"), ("weight", "weight"),
)  # fmt: skip


@lru_cache(maxsize=1 << 8)
def _kind_of(parts: frozenset[str]) -> str:
    return next((kind for part, kind in _KINDS if part in parts), "")


@lru_cache(maxsize=1 << 14)  # files of one trainer have the same names
def split_key(key: str) -> tuple[str, str]:
    """(stem, part) of a key; part "" where its end says nothing."""
    if key.endswith("_norm.scale") and (found := _SET.fullmatch(key)):
        return found["stem"], "set"
    if "_lora" in key and (found := _OLD.fullmatch(key)):
        # ``to_q_lora`` and the 1 or 2 of XLabs belong to the module.
        return found["stem"] + found["end"].partition(".")[0], found["part"]
    stem, *words = key.rsplit(".", 3)
    if not stem or (len(words) > 2 and words[0] not in _THREE):
        del words[:1]
    size, part = _end_of(".".join(words))
    return (key[: -size - 1], part) if size else (key, "")


@lru_cache(maxsize=1 << 12)  # the ends of a file's keys are few
def _end_of(words: str) -> tuple[int, str]:
    """(length of the part's name, the part) at the end of a key, (0, "") where there is none."""
    for pattern, part in _ENDS:
        if found := pattern.fullmatch(words):
            return len(found["end"]), part
    return 0, ""


def group_keys(tensors: Mapping[str, Tensor]) -> tuple[Group, ...]:
    """The tensors of a file by module, in its order."""
    stems: dict[str, dict[str, str]] = {}
    for key in tensors:
        stem, part = (key, "embedding") if key.startswith("bundle_emb.") else split_key(key)
        stems.setdefault(stem, {})[key] = part
    return tuple(_group(stem, keys, tensors) for stem, keys in stems.items())


def _group(stem: str, keys: Mapping[str, str], tensors: Mapping[str, Tensor]) -> Group:
    found = _PREFIX.match(stem)
    prefix, parts = found[0] if found else "", frozenset(keys.values())
    return Group(
        stem, prefix, keys, tensors,
        flat=stem[len(prefix) :].replace(".", "_"), parts=parts, kind=_kind_of(parts),
        is_text="_te" in prefix or prefix.startswith("text_encoder"),
    )  # fmt: skip
