"""nvfp4: 4-bit floats, an 8-bit factor for each 16, and one more for the weight.

compressed-tensors: ``X.weight_packed`` (out, in/2), two codes in a byte, the first one in its lower
half; ``X.weight_scale`` (out, in/16); ``X.weight_global_scale``, by which factors are divided.
ModelOpt: ``X.weight``, ``X.weight_scale``, ``X.weight_scale_2``, by which they are multiplied.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from loratool.adapter import CodedRef, TensorRef
from loratool.quant.base import Found, Reader, Tensors, coded, columns_of, unfit
from loratool.quant.mxfp4 import NUMBERS
from loratool.quant.reading import fill, load, load_rows, nibbles

_SIZE = 16
_BESIDE = ("weight_scale", "weight_global_scale", "weight_scale_2", "input_scale",
           "input_global_scale")  # fmt: skip


def find(tensors: Tensors, config: Mapping[str, Any], reader: Reader) -> Found:
    """Every weight in bytes with factors of 8 bits and one for all.

    Raises:
        BadFileError: LT-335.
    """
    weights: dict[str, CodedRef] = {}
    companions: set[str] = set()
    for name, ref in tensors.items():
        stem = name.removesuffix("_packed").removesuffix("weight")
        parts = {w: tensors[stem + w] for w in _BESIDE if stem + w in tensors}
        whole = parts.get("weight_global_scale") or parts.get("weight_scale_2")
        if ref.dtype == "U8" and stem != name and "weight_scale" in parts and whole is not None:
            plain = stem + "weight"
            weights[plain] = _coded(plain, ref, parts["weight_scale"], whole)
            companions |= {stem + w for w in parts}
    return Found(weights, frozenset(companions))


def _coded(name: str, ref: TensorRef, scales: TensorRef, whole: TensorRef) -> CodedRef:
    shape = (*ref.shape[:-1], columns_of(ref) * 2)
    if scales.dtype != "F8_E4M3" or scales.shape != (*shape[:-1], -(-shape[-1] // _SIZE)):
        raise unfit(scales, f"F8_E4M3 {[*shape[:-1], -(-shape[-1] // _SIZE)]}")
    if whole.numel != 1:
        raise unfit(whole, "one number")
    is_divisor = whole.name.endswith("global_scale")
    return coded("nvfp4", name, ref, shape, others={"scales": scales, "whole": whole},
                 facts={"divides": int(is_divisor)})  # fmt: skip


def decode(ref: CodedRef, reader: Reader, start: int, buffer: memoryview) -> None:
    """As `loratool.quant.base.Coder.decode`."""
    parts = dict(ref.others)
    whole = load(parts["whole"], reader).float().view(1)
    table = torch.tensor([*NUMBERS, *(-n for n in NUMBERS)])

    def rows(first: int, last: int) -> torch.Tensor:
        assert ref.codes is not None
        codes = nibbles(load_rows(ref.codes, reader, first, last))
        scales = load_rows(parts["scales"], reader, first, last).float()
        scales = scales / whole if ref.fact("divides") else scales * whole
        wide = scales.repeat_interleave(_SIZE, 1)[:, : codes.shape[1]]
        return table[codes] * wide

    fill(ref, start, buffer, rows)
