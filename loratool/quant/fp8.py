"""8-bit floats: which weights they are, numbers from codes, factors that fit, codes from numbers.

DeepSeek, Qwen: ``X.weight`` with ``X.weight_scale_inv``, a factor for each block of 128 × 128 (or
what the configuration says; the last blocks are cut), fused experts ``gate_up_proj`` likewise.
ComfyUI: ``X.scale_weight`` or ``X.weight_scale``, one factor, and a marker ``scaled_fp8`` or
``comfy_quant``.  Without any a code stands for itself.

A number is the float32 product of its code and its factor, as in transformers and torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from loratool.adapter import CodedRef
from loratool.lazy import regex
from loratool.quant import factors as shared
from loratool.quant.base import Found, Reader, Tensors, block_of, coded
from loratool.quant.schemes import block_size, group_size

DTYPES = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}

_BLOCK = (128, 128)
_COMPANION = regex(
    r"(^|\.)(scaled_fp8|comfy_quant|activation_scale|input_scale|scale_input|"
    r"\w+_(activation|input)_scale|\w*weight_scale|input_global_scale)$"
)
_METADATA = frozenset({"_quantization_metadata"})


def find(tensors: Tensors, config: Mapping[str, Any], reader: Reader) -> Found:
    """Every weight in 8-bit floats with its factors.

    Raises:
        BadFileError: LT-335.
    """
    weights, scales = {}, set()
    stated, columns = block_size(config) or _BLOCK, group_size(config)
    for name, ref in tensors.items():
        if ref.dtype not in DTYPES or _COMPANION.search(name):
            continue
        beside = next((n for n in _scale_names(name) if n in tensors), None)
        scale = None if beside is None else tensors[beside]
        if beside is not None:
            scales.add(beside)
        block = (1, 1) if scale is None else block_of(ref, scale, stated, columns)
        weights[name] = coded("fp8", name, ref, ref.shape, scales=scale, block=block)
    markers = {n for n in tensors if _COMPANION.search(n)} if weights else set()
    return Found(weights, frozenset(scales | markers), _METADATA)


def _scale_names(name: str) -> tuple[str, ...]:
    stem = name.removesuffix("weight")
    return (f"{name}_scale_inv", f"{name}_scale", f"{stem}scale_weight")


def decode(ref: CodedRef, reader: Reader, start: int, buffer: memoryview) -> None:
    """Fill ``buffer`` with the float32 numbers from byte ``start`` of the plain weight on.

    Args:
        ref: the weight.
        reader: of its files.
        start: a multiple of 4.
        buffer: a multiple of 4 bytes long.
    """
    assert ref.codes is not None
    first, count = start // 4, len(buffer) // 4
    raw = torch.empty(count, dtype=torch.uint8)
    reader.read_into(ref.codes, first, memoryview(raw.numpy()))  # type: ignore[arg-type]
    out = torch.frombuffer(buffer, dtype=torch.float32)
    out.copy_(raw.view(DTYPES[ref.codes.dtype]))
    if ref.scales is not None:
        shared.scale(out, load_scales(ref, reader), ref, first)


load_scales = shared.load_scales
store_scales = shared.store_scales


def fit(peaks: torch.Tensor, ref: CodedRef, scales: torch.Tensor) -> torch.Tensor:
    """Factors under which the largest numbers can be coded: see `loratool.quant.factors.fit`."""
    assert ref.codes is not None and ref.scales is not None
    largest = torch.finfo(DTYPES[ref.codes.dtype]).max
    held = (scales * largest).double()  # float32: the number that the largest code stands for
    return shared.fit(peaks, scales, held, peaks / largest, ref.scales.dtype)


def encode(values: torch.Tensor, factors: torch.Tensor, ref: CodedRef) -> torch.Tensor:
    """The nearest codes, ties to even; sizes beyond the largest code become it.

    Args:
        values: float64, any shape.
        factors: of each, broadcastable.
        ref: the weight.
    """
    assert ref.codes is not None
    target = DTYPES[ref.codes.dtype]
    largest = torch.finfo(target).max
    quotient = (values / factors.double()).nan_to_num_(0.0).clamp_(-largest, largest)
    return shared.to_odd(quotient).to(target)


def numbers(codes: torch.Tensor, factors: torch.Tensor, ref: CodedRef) -> torch.Tensor:
    """Codes times their factors, float32."""
    return codes.float() * factors
