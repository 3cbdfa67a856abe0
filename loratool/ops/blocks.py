"""Factors per block of a model: presets by name, or one number per block."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from loratool.archs.families import Place, block_depths, family_of, places, split_component
from loratool.errors import MismatchError, UsageError
from loratool.lazy import regex
from loratool.store.source import is_weight

_LAYER = regex(
    r"(?:^|[._])(?:layers?|h|(?:joint_|transformer_)?blocks?|encoder\.layer)[._](\d+)[._]"
)
_UNET = regex(r"(input|output)_blocks\.(\d+)\.|middle_block\.")
_PAIR = regex(r"(double|single)_blocks\.(\d+)\.")
_TEXT = regex(r"(^|\.)(text_encoder|text_model|te\d?)(\.|$)")


def _numbered(word: str, *numbers: int) -> tuple[str, ...]:
    return tuple(f"{word}{n:02}" for n in numbers)


_INS, _OUTS = _numbered("IN", *range(12)), _numbered("OUT", *range(12))
UNET_BLOCKS = {
    12: ("BASE", *_numbered("IN", 4, 5, 7, 8), "M00", *_OUTS[:6]),
    17: ("BASE", *_numbered("IN", 1, 2, 4, 5, 7, 8), "M00", *_OUTS[3:]),
    20: ("BASE", *_INS[:9], "M00", *_OUTS[:9]),
    26: ("BASE", *_INS, "M00", *_OUTS),
}
"""How many numbers -> the blocks that they are of, as the block-weight extensions have them: those
with attention of SDXL and of Stable Diffusion, all of SDXL and of Stable Diffusion."""

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
"""Name -> weights of the 17 blocks of Stable Diffusion."""
PAIR_PRESETS: Mapping[str, tuple[float, float]] = {
    "ALL": (1, 1), "DOUBLE": (1, 0), "SINGLE": (0, 1),
}  # fmt: skip
"""Name -> weights of the double and of the single blocks of FLUX and its kin; of all else 1."""


def block_factors(names: Iterable[str], text: str) -> dict[str, float]:
    """Module name -> factor; modules outside every block are left out.

    Args:
        names: in-memory names of an adapter's changes, flat or dotted, of any naming.
        text: a preset, or numbers with commas: 17 or 26 (Stable Diffusion), 12 or 20 (SDXL) for a
            UNet, whose other blocks get 0; 57 or 61 for FLUX.1 (double blocks, single blocks; or
            CLIP, T5, IN, those, OUT); one per layer for a model of numbered layers.

    Raises:
        UsageError: LT-239, no such preset, or no list of numbers.
        MismatchError: LT-466, the list does not fit the adapter's blocks.
    """
    names = list(names)
    guess = family_of({name.rpartition(".")[0]: () for name in names})
    known = [f for f in (guess.family, *guess.others) if f]
    blocks = {name: block for name in names if (block := block_of(name, known))}
    labels = set(blocks.values())
    if any(re.match(r"[DS]\d", label) for label in labels):
        table = _of_pairs(text, labels, {d for f in known for d in _depths(f)})
        return {name: table[block] for name, block in blocks.items() if block in table}
    if any(re.match(r"IN\d|OUT\d|M00", label) for label in labels):
        weights = _parse(text)
        fits = len(weights) in UNET_BLOCKS
        if not fits or (len(weights) in (12, 20) and not labels <= set(UNET_BLOCKS[20])):
            raise _refusal(text, "17 or 26 numbers (SD 1, 2), 12 or 20 (SDXL)", len(weights))
        every = dict.fromkeys(UNET_BLOCKS[26], float(text.upper() == "ALL"))
        table = every | dict(zip(UNET_BLOCKS[len(weights)], weights, strict=True))
        return {name: table[block] for name, block in blocks.items()}
    return _of_layers(text, {n: int(b) for n, b in blocks.items() if b.isdigit()})


def _of_layers(text: str, layers: Mapping[str, int]) -> dict[str, float]:
    weights = _parse(text)
    count = max(layers.values(), default=-1) + 1
    if text.upper() in PRESETS or len(weights) < count or not layers:
        found = f"layers 0-{count - 1}" if layers else "no numbered block"
        raise _refusal(
            text, "one number per layer" if layers else "a model of numbered blocks", found
        )
    return {name: weights[layer] for name, layer in layers.items()}


def _of_pairs(text: str, labels: set[str], depths: set[tuple[int, ...]]) -> dict[str, float]:
    """Label -> weight, for a model of double and single blocks."""
    preset = PAIR_PRESETS.get(text.upper())
    if preset is not None:
        return {b: preset["DS".index(b[0])] if b[0] in "DS" and b[1:].isdigit() else 1.0
                for b in labels}  # fmt: skip
    if text.upper() in PRESETS:
        raise _refusal(text, ", ".join(PAIR_PRESETS), "a preset of UNets")
    weights = _parse(text)
    for double, single in sorted(depths):
        blocks = (*_numbered("D", *range(double)), *_numbered("S", *range(single)))
        for order in (blocks, ("CLIP", "T5", "IN", *blocks, "OUT")):
            inside = labels - {"CLIP", "T5", "IN", "OUT"} <= set(order)
            if len(weights) == len(order) and inside:
                return dict(zip(order, weights, strict=True))
    counts = " or ".join(f"{a + b} ({a} double, {b} single blocks)" for a, b in sorted(depths))
    raise _refusal(text, f"{counts}, or 4 more: CLIP, T5, IN before, OUT after them", len(weights))


def block_of(name: str, families: Sequence[str] = ()) -> str:
    """The block that a change is in, "" for one outside of all.

    Of UNets ``IN04``, ``M00``, ``OUT11``, of FLUX and its kin ``D00``, ``S37``, ``IN``, ``OUT``, of
    others a layer's number; of text encoders ``BASE``, ``CLIP`` or ``T5``.

    Args:
        name: of a change.
        families: that the adapter may be of.

    Example:
        >>> block_of("unet.down_blocks_1_attentions_0_proj_in.weight")
        'IN04'
        >>> block_of("unet.single_blocks_3_linear1.weight", ["flux1"])
        'S03'
    """
    module, _, parameter = name.rpartition(".")
    component, rest = split_component(module)
    is_pair = any(map(_depths, families))
    if _TEXT.search(module) or component.startswith("te"):
        if not is_pair:
            return "BASE"
        found = places(component, rest, parameter)
        return "T5" if any("SelfAttention" in n or "DenseReluDense" in n
                           for p in found for n in p.diffusers) else "CLIP"  # fmt: skip
    found = places(component, rest, parameter)
    own = [p for p in found if p.family in families] or found
    return next((label for p in own if (label := _label(p))), "") or _layer_of(module)


def _depths(family: str) -> set[tuple[int, ...]]:
    """(double, single) blocks of the sizes of a family that has both, else nothing."""
    return block_depths(family, "double_blocks", "single_blocks")


def _label(place: Place) -> str:
    """The block of a place, "" for a module outside of all."""
    name = place.original[0] + "."
    if found := _UNET.match(name):
        word = {"input": "IN", "output": "OUT"}.get(found[1] or "", "M")
        return f"{word}{int(found[2] or 0):02}"
    if found := _PAIR.match(name):
        return f"{found[1][0].upper()}{int(found[2]):02}"
    if _depths(place.family):
        return "OUT" if name.startswith("final_layer") else "IN"
    return _layer_of(name)


def _layer_of(name: str) -> str:
    layer = _LAYER.search(name + ".")
    return layer[1] if layer else ""


def _parse(text: str) -> Sequence[float]:
    preset = PRESETS.get(text.upper())
    if preset is not None:
        return [float(digit) for digit in preset]
    parts = [part.strip() for part in text.split(",")]
    if len(parts) < 2 or not all(map(is_weight, parts)):
        known = ", ".join(dict.fromkeys((*PRESETS, *PAIR_PRESETS)))
        raise UsageError(
            "LT-239", "unknown --blocks", got=text,
            expected=f"{known}, or one number per block such as 1,0.5,0",
        )  # fmt: skip
    return [float(part) for part in parts]


def _refusal(text: str, expected: str, got: object) -> MismatchError:
    return MismatchError(
        "LT-466", "--blocks does not fit the adapter's blocks", key=text, expected=expected, got=got
    )
