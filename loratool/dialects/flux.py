"""Two spellings that only FLUX has: the control LoRAs of its makers, and XLabs' processors."""

from __future__ import annotations

from loratool.dialects.base import Dialect
from loratool.dialects.dotted import TABLE, detector
from loratool.dialects.fields import Component, Field
from loratool.frozen import replace

_BARE = Component("", "", ("unet", "transformer", "diffusion_model"))
BFL = Dialect(
    "bfl", "BFL (FLUX control LoRA)", detector("bfl"),
    replace(TABLE, components=(_BARE,), alpha="", renames=(), only=("lowrank", "vector"),
            of=("flux1", "chroma"), naming="original", growing=("img_in",)), holds_whole=True,
    library="diffusers",
)  # fmt: skip
XLABS = Dialect(
    "xlabs", "XLabs FLUX", detector("xlabs"),
    replace(
        TABLE, components=(_BARE, Component("diffusion_model.", "diffusion_model")), alpha="",
        renames=(), fields=(Field("down.weight", "lora_A"), Field("up.weight", "lora_B")),
        only=("lowrank",), of=("flux1",), naming="xlabs",
    ), library="diffusers",
)  # fmt: skip
