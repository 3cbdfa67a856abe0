"""What class of module a weight belongs to, as far as PEFT asks: it adapts some and no others.

Weight files do not say.  For models of transformers the tables do; for any other model only a few
names are sure, and what is not sure is a parameter: that is right whatever the module is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loratool.archs.base import load_data
from loratool.archs.layers import is_native, model_types
from loratool.lazy import regex

_NUMBER = regex(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)")
_EXPERT_LEAVES = frozenset(
    {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
)  # what PEFT takes for parts of fused experts in every model that has some


def fuses_experts(config: Mapping[str, Any]) -> bool:
    """True if transformers 5 makes one parameter of experts that have files of their own."""
    return any(t in load_data("classes")["fused_experts"] for t in model_types(config))


def is_table(module: str) -> bool:
    """True for a module whose name only embeddings have."""
    return module.rpartition(".")[2] in load_data("classes")["embeddings"]


def holder_of(
    config: Mapping[str, Any], name: str, shape: Sequence[int], *, has_experts: bool = False
) -> str:
    """How PEFT can hold a low-rank change of a weight with two dimensions or more.

    Args:
        config: of the base.
        name: of the tensor, in memory.
        shape: of the tensor.
        has_experts: the model has experts, whose names PEFT rewrites.

    Returns:
        ``linear``, ``conv`` or ``embedding`` (factors on the module), ``parameter`` or ``experts``
        (factors on the parameter itself, two or three dimensions), ``whole`` (no factors).

    Example:
        >>> holder_of({"model_type": "mixtral"}, "model.layers.0.mlp.gate.weight", (8, 64))
        'parameter'
    """
    path, _, parameter = name.rpartition(".")
    leaf = path.rpartition(".")[2]
    table = load_data("classes")
    types = model_types(config)
    if any(leaf in table["refused"].get(t, ()) for t in types):
        return "whole"
    if parameter != "weight":
        return "experts" if len(shape) == 3 else "whole"
    if len(shape) > 2:
        return _stack_or_conv(config, path, shape)
    if has_experts and leaf in _EXPERT_LEAVES:
        return "parameter"
    if not is_native(config):
        return "linear" if leaf in table["linear"] else "parameter"
    if is_table(path):
        return "embedding"
    return "parameter" if leaf in table["own"] or leaf.isdigit() else "linear"


def _stack_or_conv(config: Mapping[str, Any], path: str, shape: Sequence[int]) -> str:
    if is_native(config):
        ends = ".".join(_NUMBER.sub("{n}", path).split(".")[-2:])
        types = model_types(config)
        if any(ends in load_data("classes")["stacked"].get(t, ()) for t in types):
            return "experts"
        if any(ends in load_data("classes")["not_plain"].get(t, ()) for t in types):
            return "whole"
    elif len(shape) == 3 and shape[2] >= shape[1]:
        return "experts"  # a kernel is shorter than its channels are many
    if len(shape) > 3 and set(shape[:3]) == {1}:
        return "whole"  # a vector that is spread over images, such as a norm's
    # One input channel is nearly always one per group, and PEFT merges no groups.
    return "whole" if shape[1] == 1 and shape[0] > 1 else "conv"
