"""Which modules tables and maps put together, by their names alone."""

from __future__ import annotations

from functools import lru_cache

from loratool.frozen import Frozen
from loratool.lazy import regex

_FLAT, _DOTTED = regex(r"_\d+_"), regex(r"\.\d+(\.|$)")


class Place(Frozen):
    """Where a module is: which blocks, which of them (None = no number), which row of it."""

    group: str
    layer: int | None
    family: str


@lru_cache(maxsize=1 << 14)  # files of one trainer have the same names
def place_of(name: str) -> Place:
    """The place that a module's name tells: its first number, and what follows the last one.

    Names that have lost their dots are read as if their numbers still had them: the one home of
    what tables and maps put together.

    Example:
        >>> place_of("model.layers.3.mlp.up_proj.weight")
        Place(group='model.layers', layer=3, family='up_proj')
        >>> place_of("down_blocks_1_attentions_0_attn1_to_out_0")
        Place(group='down_blocks', layer=1, family='attn1_to_out')
    """
    name = name.removesuffix(".weight").removesuffix(".bias")
    head, _, tail = name.rpartition(".")
    is_flat = _FLAT.search(tail) is not None and _DOTTED.search(name) is None
    mark = "_" if is_flat else "."
    parts = (tail if is_flat else name).split(mark)
    end = len(parts)
    while end > 1 and parts[end - 1].isdecimal():
        end -= 1
    numbers = [i for i in range(end) if parts[i].isdecimal()]
    first = next((i for i in numbers if i), None)
    last = numbers[-1] + 1 if numbers else 0
    family = mark.join(parts[last if is_flat else end - 1 : end])
    group = ".".join(filter(None, (head if is_flat else "", mark.join(parts[:first]))))
    if first is None:
        return Place(head if is_flat else "", None, family)
    return Place(group, int(parts[first][:9]), family)


def family_of(name: str) -> str:
    """The family of a parameter: of modules its `place_of`, biases apart from their weights.

    Example:
        >>> family_of("model.layers.3.self_attn.q_proj.bias")
        'q_proj.bias'
        >>> family_of("lora_unet_up_blocks_1_resnets_0_conv1.weight")
        'conv1'
    """
    return place_of(name).family + (".bias" if name.endswith(".bias") else "")
