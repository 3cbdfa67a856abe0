"""sd-scripts' own tools: resize_lora.py, merge_lora.py, svd_merge_lora.py."""

from __future__ import annotations

from loratool.dialects.programs.base import DROPPED, RAISES, UNSURE, WRONG, Program, Rule
from loratool.dialects.programs.grammar import Group
from loratool.dialects.programs.look import Look
from loratool.dialects.programs.where import is_of_language, language, where

_HOME = "https://github.com/kohya-ss/sd-scripts/"
_TOOLS = _HOME + "blob/main/networks/"


def _is_other(_: Look, group: Group) -> bool:
    return not any(".lora_down." in key or ".lora_up." in key for key in group.keys)


SD_SCRIPTS = Program(
    "sd-scripts",
    "sd-scripts",
    "48d368fa (2026-02-16)",
    (_TOOLS + "resize_lora.py", _TOOLS + "merge_lora.py", _TOOLS + "svd_merge_lora.py"),
    (
        Rule("letters", RAISES, where(kind=("lora",), alike=_is_other),
             "other factors than lora_down",
             "resize_lora finds no rank and stops; merge_lora leaves the model as it is",
             _HOME + "issues/2169", is_mended=True),
        Rule("algorithm", DROPPED, where(kind=(
             "loha", "lokr", "glora", "oft", "ia3", "tlora", "full", "norm", "set")),
             "anything but plain LoRA", "keys other than lora_down and lora_up are passed over",
             _HOME + "issues/1612", is_mended=True),
        Rule("core", DROPPED, where(part=("mid",)), "a Tucker core",
             "the core is passed over", _TOOLS + "merge_lora.py", is_mended=True),
        Rule("dora", WRONG, where(part=("dora", "magnitude")), "DoRA",
             "the lengths are passed over and the plain LoRA is merged", _TOOLS + "merge_lora.py"),
        Rule("unknown-end", DROPPED, where(part=("", "embedding")), "unknown tensors",
             "keys other than lora_down and lora_up are passed over", _TOOLS + "merge_lora.py"),
        language("merge_lora finds none of its names in the models that it opens",
                 _TOOLS + "merge_lora.py"),
        Rule("unknown-model", UNSURE, where(alike=lambda look, g: not (
             look.family.name or g.is_text or is_of_language(look))),
             "a model that is not known here",
             "merge_lora passes over names that its models do not have", _TOOLS + "merge_lora.py"),
    ),
    also=("kohya",), is_of_images=True, homes={"": "kohya"},
)  # fmt: skip
