"""Whole numbers of 8 bits, each times the factor of its row, group or block.

bitsandbytes: ``X.weight`` beside ``X.SCB``, the largest size in each row; a number is the float32
product of code, row and 1/127.  compressed-tensors: ``X.weight_scale``, the product of two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from loratool.adapter import CodedRef, TensorRef
from loratool.quant import factors as shared
from loratool.quant.base import Found, Reader, Tensors, block_of, coded, columns_of
from loratool.quant.reading import raw
from loratool.quant.schemes import block_size, group_size

_LARGEST = 127
_UNIT = 7.874015718698502e-3  # 1/127 in float32, as bitsandbytes has it
_UNITS = {"SCB": _UNIT, "weight_scale": 1.0}
_BESIDE = ("weight_format", "input_scale", "input_zero_point")


def find(tensors: Tensors, config: Mapping[str, Any], reader: Reader) -> Found:
    """Every weight in 8-bit integers with factors and without zero points.

    Raises:
        BadFileError: LT-335.
    """
    weights: dict[str, CodedRef] = {}
    companions: set[str] = set()
    for name, ref in tensors.items():
        stem = name.removesuffix("weight")
        word = next((w for w in _UNITS if stem + w in tensors), None)
        if ref.dtype != "I8" or stem == name or not word or f"{name}_zero_point" in tensors:
            continue
        weights[name] = _coded(name, ref, tensors[stem + word], _UNITS[word], config)
        companions |= {stem + w for w in (word, *_BESIDE) if stem + w in tensors}
    return Found(weights, frozenset(companions))


def _coded(
    name: str, ref: TensorRef, scale: TensorRef, unit: float, config: Mapping[str, Any]
) -> CodedRef:
    block = block_of(ref, scale, block_size(config) or (1, columns_of(ref)), group_size(config))
    return coded("int8", name, ref, ref.shape, scales=scale, block=block, facts={"unit": unit})


load_scales = shared.load_scales
store_scales = shared.store_scales


def decode(ref: CodedRef, reader: Reader, start: int, buffer: memoryview) -> None:
    """As `loratool.quant.base.Coder.decode`."""
    assert ref.codes is not None
    first, count = start // 4, len(buffer) // 4
    if count:
        out = torch.frombuffer(buffer, dtype=torch.float32)
        out.copy_(raw(ref.codes, reader, first, first + count).view(torch.int8))
        shared.scale(out, load_scales(ref, reader), ref, first)
        out.mul_(ref.fact("unit"))


def fit(peaks: torch.Tensor, ref: CodedRef, scales: torch.Tensor) -> torch.Tensor:
    """Factors under which the largest numbers can be coded: see `loratool.quant.factors.fit`."""
    assert ref.scales is not None
    held = numbers(torch.full_like(scales, _LARGEST), scales, ref).double()
    wanted = peaks / (_LARGEST * ref.fact("unit"))
    return shared.fit(peaks, scales, held, wanted, ref.scales.dtype)


def encode(values: torch.Tensor, factors: torch.Tensor, ref: CodedRef) -> torch.Tensor:
    """The nearest codes, ties to even; sizes beyond the largest code become it.

    Args:
        values: float64, any shape.
        factors: of each, broadcastable.
        ref: the weight.
    """
    quotient = (values / (factors.double() * ref.fact("unit"))).nan_to_num_(0.0)
    near = quotient.round_().clamp_(-_LARGEST, _LARGEST)
    miss = values - numbers(near, factors, ref).double()
    other = (near + miss.sign()).clamp_(-_LARGEST, _LARGEST)  # numbers are rounded to float32
    is_nearer = (values - numbers(other, factors, ref).double()).abs() < miss.abs()
    return torch.where(is_nearer, other, near).to(torch.int8)


def numbers(codes: torch.Tensor, factors: torch.Tensor, ref: CodedRef) -> torch.Tensor:
    """Codes times their factors, float32."""
    unit: float = ref.fact("unit")
    return codes.float() * factors * unit
