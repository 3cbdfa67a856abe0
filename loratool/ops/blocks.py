"""Factors per block of a model: presets of UNets by name, or one number per block."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from loratool.archs.places import places
from loratool.errors import MismatchError, UsageError
from loratool.store.source import is_weight

_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?|transformer_blocks|encoder\.layer)\.(\d+)\.")
_UNET = re.compile(r"(down|up)_blocks\.(\d+)\.(?:attentions|resnets)\.(\d+)\.|mid_block\.")
_TEXT = re.compile(r"(^|\.)(text_encoder|text_model|te\d?)(\.|$)")

# Blocks that hold attention, in the order of the "LoRA block weight" lists that circulate.
SD_BLOCKS = (
    "BASE", "down.0.0", "down.0.1", "down.1.0", "down.1.1", "down.2.0", "down.2.1", "mid",
    "up.1.0", "up.1.1", "up.1.2", "up.2.0", "up.2.1", "up.2.2", "up.3.0", "up.3.1", "up.3.2",
)  # fmt: skip
SDXL_BLOCKS = (
    "BASE", "down.1.0", "down.1.1", "down.2.0", "down.2.1", "mid",
    "up.0.0", "up.0.1", "up.0.2", "up.1.0", "up.1.1", "up.1.2",
)  # fmt: skip

PRESETS: Mapping[str, str] = {
    "ALL": "11111111111111111",
    "INS": "11100000000000000",
    "IND": "10001110000000000",
    "INALL": "11111110000000000",
    "MIDD": "10001111111100000",
    "OUTD": "10000000111100000",
    "OUTS": "10000000000011111",
    "OUTALL": "10000000111111111",
}
"""Name -> weights of `SD_BLOCKS`, as the block-weight extensions of Stable Diffusion have them."""


def block_factors(names: Iterable[str], text: str) -> dict[str, float]:
    """Module name -> factor; modules outside every block are left out.

    Args:
        names: in-memory module names of an adapter.
        text: a preset of `PRESETS`, or numbers with commas: 17 (Stable Diffusion) or 12 (SDXL) for
            a UNet, one per layer for a model of numbered layers.

    Raises:
        UsageError: LT-239, no such preset, or no list of numbers.
        MismatchError: LT-466, the list does not fit the adapter's blocks.
    """
    weights = _parse(text)
    blocks = {name: block for name in names if (block := block_of(name))}
    if any(not b.isdigit() and b != "BASE" for b in blocks.values()):
        order = SDXL_BLOCKS if len(weights) == len(SDXL_BLOCKS) else SD_BLOCKS
        table = dict(zip(order, weights, strict=False))
        unknown = sorted({b for b in blocks.values() if b not in table})
        if len(weights) != len(order) or unknown:
            _refuse(text, "17 blocks (SD 1, 2) or 12 (SDXL)", ", ".join(unknown) or len(weights))
        return {name: table[block] for name, block in blocks.items()}
    layers = {name: int(block) for name, block in blocks.items() if block.isdigit()}
    count = max(layers.values(), default=-1) + 1
    if text.upper() in PRESETS or len(weights) < count or not layers:
        found = f"layers 0-{count - 1}" if layers else "no numbered block"
        _refuse(text, "one number per layer" if layers else "a model of numbered blocks", found)
    return {name: weights[layer] for name, layer in layers.items()}


def block_of(name: str) -> str:
    """``down.1.0``, ``mid``, ``BASE`` (text encoder), a layer number, or "".

    Example:
        >>> block_of("down_blocks.1.attentions.0.proj_in.weight"), block_of("model.layers.7.a.w")
        ('down.1.0', '7')
        >>> block_of("input_blocks_4_1_proj_in.weight"), block_of("te1.text_model_encoder_x.weight")
        ('down.1.0', 'BASE')
    """
    if _TEXT.search(name):
        return "BASE"
    if found := _UNET.search(name):
        return _unet_block(found)
    if layer := _LAYER.search(name):
        return layer[1]
    module, _, parameter = name.rpartition(".")  # flat, or as the original code has it
    also = (n for place in places("unet", module, parameter) for n in place.diffusers)
    return next((_unet_block(found) for n in also if (found := _UNET.search(n))), "")


def _unet_block(found: re.Match[str]) -> str:
    return "mid" if found[1] is None else f"{found[1]}.{found[2]}.{found[3]}"


def _parse(text: str) -> Sequence[float]:
    preset = PRESETS.get(text.upper())
    if preset is not None:
        return [float(digit) for digit in preset]
    parts = [part.strip() for part in text.split(",")]
    if len(parts) < 2 or not all(map(is_weight, parts)):
        raise UsageError(
            "LT-239", "unknown --blocks", got=text,
            expected=f"{', '.join(PRESETS)}, or one number per block such as 1,0.5,0",
        )  # fmt: skip
    return [float(part) for part in parts]


def _refuse(text: str, expected: str, got: object) -> None:
    raise MismatchError(
        "LT-466", "--blocks does not fit the adapter's blocks", key=text, expected=expected, got=got
    )
