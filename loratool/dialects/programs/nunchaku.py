"""nunchaku: plain LoRA that is rewritten for its quantised layers."""

from __future__ import annotations

from loratool.dialects.programs.base import RAISES, Program, Rule
from loratool.dialects.programs.where import FACTORS, is_alone, lacks_alpha, numbered, where

_CODE = "https://github.com/nunchaku-tech/nunchaku/blob/3a3cc3d/nunchaku/lora/flux/diffusers_converter.py"
_ISSUES = "https://github.com/nunchaku-tech/ComfyUI-nunchaku/issues/"

_PLAIN = FACTORS | {"diff_b", "bias"}

NUNCHAKU = Program(
    "nunchaku",
    "nunchaku",
    "3a3cc3d",
    (_CODE,),
    (
        Rule("bias", RAISES, where(part=("diff_b", "bias")), "biases",
             "it stops at changes of biases", _ISSUES + "94"),
        Rule("algorithm", RAISES, where(alike=lambda _, g: not g.parts <= _PLAIN),
             "anything but plain LoRA", "it takes lora_A with lora_B alone", _CODE, is_mended=True),
        Rule("one-factor", RAISES, where(kind=("lora",), alike=is_alone), "one factor alone",
             "it needs lora_A and lora_B", _CODE),
        Rule("alpha", RAISES, where(kind=("lora",), alike=lambda look, g:
             numbered(look, g) and lacks_alpha(look, g)), "no alpha",
             "it stops at a lora_down without alpha", _ISSUES + "64", is_mended=True),
    ),
    is_of_images=True, homes={"": "diffusers"},
)  # fmt: skip
