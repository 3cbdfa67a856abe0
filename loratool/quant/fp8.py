"""8-bit floats: which weights they are, numbers from codes, factors that fit, codes from numbers.

DeepSeek, Qwen: ``X.weight`` with ``X.weight_scale_inv``, a factor for each block of 128 × 128 (or
what the configuration says; the last blocks are cut), fused experts ``gate_up_proj`` likewise.
ComfyUI: ``X.scale_weight`` or ``X.weight_scale``, one factor, and a marker ``scaled_fp8`` or
``comfy_quant``.  Without any a code stands for itself.

A number is the float32 product of its code and its factor, as in transformers and torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from loratool.adapter import CodedRef, TensorRef
from loratool.dtypes import tensor_bytes
from loratool.errors import BadFileError
from loratool.quant.base import Found, Reader, Tensors, block_rows

DTYPES = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
_SCALES = {
    "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64,
    "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


_BLOCK = (128, 128)
_COMPANION = re.compile(
    r"(^|\.)(scaled_fp8|comfy_quant|activation_scale|input_scale|scale_input|"
    r"\w+_(activation|input)_scale)$"
)
_METADATA = frozenset({"_quantization_metadata"})


def find(tensors: Tensors, config: Mapping[str, Any]) -> Found:
    """Every weight in 8-bit floats with its factors.

    Raises:
        BadFileError: LT-335.
    """
    weights, scales = {}, set()
    stated = _stated_block(config)
    for name, ref in tensors.items():
        if ref.dtype not in DTYPES or _COMPANION.search(name):
            continue
        beside = next((n for n in _scale_names(name) if n in tensors), None)
        scale = None if beside is None else tensors[beside]
        if beside is not None:
            scales.add(beside)
        weights[name] = _coded(ref, scale, stated)
    markers = {n for n in tensors if _COMPANION.search(n)} if weights else set()
    return Found(weights, frozenset(scales | markers), _METADATA)


def _scale_names(name: str) -> tuple[str, ...]:
    stem = name.removesuffix("weight")
    return (f"{name}_scale_inv", f"{name}_scale", f"{stem}scale_weight")


def _coded(ref: TensorRef, scale: TensorRef | None, stated: tuple[int, int]) -> CodedRef:
    block = (1, 1) if scale is None else _block(ref, scale, stated)
    return CodedRef(
        ref.file, ref.name, "F32", ref.shape, ref.start, tensor_bytes("F32", ref.shape), ref.stamp,
        codec="fp8", codes=ref, scales=scale, block=block,
    )  # fmt: skip


def _block(ref: TensorRef, scale: TensorRef, stated: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) that one factor is for; no higher than a matrix of a stack."""
    *_, rows, cols = (1, 1, *ref.shape)
    if scale.numel == 1:
        return max(1, ref.numel // max(1, cols)), cols
    height, width = stated
    blocks = (*ref.shape[:-2], -(-rows // height), -(-cols // width))
    if scale.shape == blocks:
        return max(1, min(height, rows)), width
    if scale.shape in (ref.shape[:-1], (*ref.shape[:-1], 1)):
        return 1, cols
    raise BadFileError(
        "LT-335", "the factors of a quantised weight do not fit it", file=ref.path, key=scale.name,
        expected=f"{list(blocks)} for blocks of {height} × {width}, or one per row, or one",
        got=list(scale.shape),
    )  # fmt: skip


def _stated_block(config: Mapping[str, Any]) -> tuple[int, int]:
    for holder in (config, config.get("text_config")):
        said = holder.get("quantization_config") if isinstance(holder, Mapping) else None
        size = said.get("weight_block_size") if isinstance(said, Mapping) else None
        if (
            isinstance(size, list) and len(size) == 2
            and all(type(n) is int and n > 0 for n in size)
        ):  # fmt: skip
            return size[0], size[1]
    return _BLOCK


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
        _scale(out, load_scales(ref, reader), ref, first)


def load_scales(ref: CodedRef, reader: Reader) -> torch.Tensor:
    """Factors (rows of blocks, columns of blocks), float32, those of a stack below each other."""
    assert ref.scales is not None
    raw = torch.empty(ref.scales.nbytes, dtype=torch.uint8)
    reader.read_into(ref.scales, 0, memoryview(raw.numpy()))  # type: ignore[arg-type]
    cols = ref.shape[-1] if ref.shape else 1
    return raw.view(_SCALES[ref.scales.dtype]).float().view(-1, -(-cols // ref.block[1]))


def _scale(values: torch.Tensor, scales: torch.Tensor, ref: CodedRef, first: int) -> None:
    """Multiply flat float32 numbers of a weight by their factors, in place.

    Args:
        values: (n,), from element ``first`` of the weight on.
        scales: of `load_scales`.
        ref: the weight.
        first: position of the first element.
    """
    cols = ref.shape[-1] if ref.shape else 1
    width = min(ref.block[1], cols)
    if first % cols or len(values) % cols:  # part of a row
        at = torch.arange(first, first + len(values))
        values.mul_(scales[block_rows(at // cols, ref), at % cols // width])
        return
    rows = values.view(-1, cols)
    factors = scales[block_rows(torch.arange(first // cols, first // cols + len(rows)), ref)]
    whole = cols // width * width
    torch.unflatten(rows[:, :whole], 1, (-1, width)).mul_(factors[:, : whole // width, None])
    if whole < cols:
        rows[:, whole:].mul_(factors[:, -1:])


def fit(peaks: torch.Tensor, ref: CodedRef, scales: torch.Tensor) -> torch.Tensor:
    """Factors under which the largest numbers of all blocks can be coded.

    A factor stays where it holds its block: another one would round every number in it anew.

    Args:
        peaks: largest size in each block, float64, shape of ``scales``.
        ref: the weight.
        scales: the old factors, float32.

    Returns:
        float32, every one representable in the type of the factors.
    """
    assert ref.codes is not None and ref.scales is not None
    largest = torch.finfo(DTYPES[ref.codes.dtype]).max
    held = (scales * largest).double()  # float32: the number that the largest code stands for
    grown = _rounded_up(peaks / largest, ref.scales.dtype)
    return torch.where(peaks <= held, scales.double(), grown).float()


def _rounded_up(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """The smallest numbers of a type that are not below; float64."""
    if dtype == "F8_E8M0":
        return torch.exp2(torch.log2(values.clamp_min(2.0**-127)).ceil())
    target = _SCALES[dtype]
    near = values.to(target)
    above = torch.nextafter(near, torch.full_like(near, torch.inf))
    return torch.where(near.double() < values, above, near).double()


def store_scales(scales: torch.Tensor, dtype: str) -> torch.Tensor:
    """Factors in the type that they are stored in."""
    return scales.to(_SCALES[dtype])


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
    return _to_odd(quotient).to(target)


def numbers(codes: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Codes times their factors, float32."""
    return codes.float() * factors


def _to_odd(values: torch.Tensor) -> torch.Tensor:
    """float64 as float32, cut with the last bit set where anything is cut: no second rounding."""
    cut = values.float()
    bits = cut.view(torch.int32)
    bits -= (cut.double().abs() > values.abs()).int()
    bits |= (cut.double() != values).int()
    return cut
