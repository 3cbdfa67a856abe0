"""How files of image models name tensors: prefix, module and part, whoever wrote them.

Nothing is resolved here: a rule of a program sees what the program sees, a name.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import NamedTuple

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
_ENDS = [(regex(rf"(?P<stem>.+)\.(?P<end>{end})"), part) for end, part in _PARTS]
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


_ANY = ("", "transformer.", "base_model.model.", "base_model.model.transformer.", "prior.")
"""Prefixes that other models have too."""


class Tensor(NamedTuple):
    """Type and shape."""

    dtype: str
    shape: tuple[int, ...]


class Group(Frozen, dict=True):
    """The tensors of one module.

    Attributes:
        stem: the name without what the parts end in.
        prefix: how it begins, "" where modules have no prefix.
        keys: key -> its part, "" where the ending says nothing.
        tensors: key -> type and shape.
    """

    stem: str
    prefix: str
    keys: Mapping[str, str]
    tensors: Mapping[str, Tensor]

    @property
    def path(self) -> str:
        """The module without its prefix, as spelled."""
        return self.stem[len(self.prefix) :]

    @cached_property
    def flat(self) -> str:
        """The module without its prefix, with underscores for dots."""
        return self.path.replace(".", "_")

    @property
    def is_flat(self) -> bool:
        """True if its dots are lost."""
        return self.prefix.endswith("_")

    @cached_property
    def parts(self) -> frozenset[str]:
        """All of its parts."""
        return frozenset(self.keys.values())

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

    @cached_property
    def kind(self) -> str:
        """The algorithm: what decides is the part that no other one has."""
        return next((kind for part, kind in _KINDS if part in self.parts), "")

    @property
    def is_text(self) -> bool:
        """True for a text encoder's."""
        return "_te" in self.prefix or self.prefix.startswith("text_encoder")

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


def split_key(key: str) -> tuple[str, str]:
    """(stem, part) of a key; part "" where its end says nothing."""
    if found := _SET.fullmatch(key):
        return found["stem"], "set"
    if found := _OLD.fullmatch(key):
        # ``to_q_lora`` and the 1 or 2 of XLabs belong to the module.
        return found["stem"] + found["end"].partition(".")[0], found["part"]
    for pattern, part in _ENDS:
        if found := pattern.fullmatch(key):
            return found["stem"], part
    return key, ""


def group_keys(tensors: Mapping[str, Tensor]) -> tuple[Group, ...]:
    """The tensors of a file by module, in its order."""
    stems: dict[str, dict[str, str]] = {}
    for key in tensors:
        stem, part = (key, "embedding") if key.startswith("bundle_emb.") else split_key(key)
        stems.setdefault(stem, {})[key] = part
    return tuple(
        Group(stem, _prefix_of(stem), keys, {key: tensors[key] for key in keys})
        for stem, keys in stems.items()
    )


def _prefix_of(stem: str) -> str:
    return next((p for p in _PREFIXES if stem.startswith(p)), "")
