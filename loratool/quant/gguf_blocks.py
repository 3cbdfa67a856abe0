"""Blocks of ggml as numbers: what the bytes of each type stand for, to the bit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from loratool.frozen import Frozen

_K = 256


class Blocks(Frozen):
    """A type of ggml.

    Attributes:
        size: numbers in a block.
        nbytes: bytes of a block.
        numbers: (n, nbytes) uint8 -> (n, size) float32.
    """

    size: int
    nbytes: int
    numbers: Callable[[Tensor], Tensor]


def _half(raw: Tensor) -> Tensor:
    """(n, 2) bytes -> (n, 1) float32."""
    return raw.contiguous().view(torch.float16).float()


def _shifted(raw: Tensor, width: int, *shifts: int) -> Tensor:
    """(n, m) bytes -> (n, m/width, shifts, width): each run of bytes once for each shift."""
    runs = raw.reshape(len(raw), -1, 1, width)
    return runs >> torch.tensor(shifts, dtype=torch.uint8).view(1, 1, -1, 1)


def _low_and_high(raw: Tensor, width: int) -> Tensor:
    """Lower halves of a run of bytes, then its upper ones, (n, 2·m)."""
    return (_shifted(raw, width, 0, 4) & 15).flatten(1)


def _q4_0(b: Tensor) -> Tensor:
    return _half(b[:, :2]) * (_low_and_high(b[:, 2:], 16).float() - 8)


def _q4_1(b: Tensor) -> Tensor:
    return _half(b[:, :2]) * _low_and_high(b[:, 4:], 16).float() + _half(b[:, 2:4])


def _fifth(b: Tensor) -> Tensor:
    """The fifth bit of each of 32 numbers, from four bytes."""
    bits = b.unsqueeze(2) >> torch.arange(8, dtype=torch.uint8)
    return (bits & 1).flatten(1) << 4


def _q5_0(b: Tensor) -> Tensor:
    codes = _low_and_high(b[:, 6:], 16) | _fifth(b[:, 2:6])
    return _half(b[:, :2]) * (codes.float() - 16)


def _q5_1(b: Tensor) -> Tensor:
    codes = _low_and_high(b[:, 8:], 16) | _fifth(b[:, 4:8])
    return _half(b[:, :2]) * codes.float() + _half(b[:, 2:4])


def _q8_0(b: Tensor) -> Tensor:
    return b[:, 2:].contiguous().view(torch.int8).float() * _half(b[:, :2])


def _grouped(codes: Tensor, factors: Tensor) -> Tensor:
    """(n, 256) codes as groups, one for each factor of (n, groups)."""
    return codes.float().reshape(len(codes), factors.shape[1], -1)


def _q2_k(b: Tensor) -> Tensor:
    scales, codes = b[:, :16], _shifted(b[:, 16:80], 32, 0, 2, 4, 6) & 3
    factor = _half(b[:, 80:82]) * (scales & 15).float()
    less = _half(b[:, 82:84]) * (scales >> 4).float()
    grouped = _grouped(codes.flatten(1), factor)
    return (factor.unsqueeze(2) * grouped - less.unsqueeze(2)).flatten(1)


def _q3_k(b: Tensor) -> Tensor:
    high, low = b[:, :32], _shifted(b[:, 32:96], 32, 0, 2, 4, 6) & 3
    scales = b[:, 96:108]
    lower = torch.cat([scales[:, :8] & 15, scales[:, :8] >> 4], 1)
    upper = (_shifted(scales[:, 8:], 4, 0, 2, 4, 6) & 3).flatten(1)
    factor = _half(b[:, 108:110]) * ((lower | upper << 4).float() - 32)
    absent = (_shifted(high, 32, *range(8)) & 1).flatten(1) ^ 1
    codes = low.flatten(1).float() - (absent << 2).float()
    return (factor.unsqueeze(2) * _grouped(codes, factor)).flatten(1)


def _scales_and_mins(b: Tensor) -> tuple[Tensor, Tensor]:
    """Eight factors and eight minima of 6 bits, from twelve bytes; float32."""
    low, mid, high = b[:, :4], b[:, 4:8], b[:, 8:]
    scales = torch.cat([low & 63, (high & 15) | ((low >> 2) & 48)], 1)
    mins = torch.cat([mid & 63, (high >> 4) | ((mid >> 2) & 48)], 1)
    return scales.float(), mins.float()


def _with_mins(b: Tensor, codes: Tensor) -> Tensor:
    scales, mins = _scales_and_mins(b[:, 4:16])
    factor, less = _half(b[:, :2]) * scales, _half(b[:, 2:4]) * mins
    grouped = _grouped(codes, factor)
    return (factor.unsqueeze(2) * grouped - less.unsqueeze(2)).flatten(1)


def _q4_k(b: Tensor) -> Tensor:
    return _with_mins(b, _low_and_high(b[:, 16:], 32))


def _q5_k(b: Tensor) -> Tensor:
    fifth = (_shifted(b[:, 16:48], 32, *range(8)) & 1).flatten(1) << 4
    return _with_mins(b, _low_and_high(b[:, 48:], 32) | fifth)


def _q6_k(b: Tensor) -> Tensor:
    upper = (_shifted(b[:, 128:192], 32, 0, 2, 4, 6) & 3).flatten(1) << 4
    codes = (_low_and_high(b[:, :128], 64) | upper).float() - 32
    scales = b[:, 192:208].contiguous().view(torch.int8).float()
    factor = _half(b[:, 208:210]) * scales
    return (factor.unsqueeze(2) * _grouped(codes, factor)).flatten(1)


def _plain(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda b: b.contiguous().view(dtype).float()


TYPES: dict[str, Blocks] = {
    "F32": Blocks(1, 4, _plain(torch.float32)), "F16": Blocks(1, 2, _plain(torch.float16)),
    "BF16": Blocks(1, 2, _plain(torch.bfloat16)), "F64": Blocks(1, 8, _plain(torch.float64)),
    "Q4_0": Blocks(32, 18, _q4_0), "Q4_1": Blocks(32, 20, _q4_1),
    "Q5_0": Blocks(32, 22, _q5_0), "Q5_1": Blocks(32, 24, _q5_1), "Q8_0": Blocks(32, 34, _q8_0),
    "Q2_K": Blocks(_K, 84, _q2_k), "Q3_K": Blocks(_K, 110, _q3_k), "Q4_K": Blocks(_K, 144, _q4_k),
    "Q5_K": Blocks(_K, 176, _q5_k), "Q6_K": Blocks(_K, 210, _q6_k),
}  # fmt: skip
"""By the names that ggml gives them."""


def blocks_of(kind: str) -> Blocks | None:
    """A type of ggml: one of `TYPES`, or one that the package ``gguf`` knows, where that is there.

    Args:
        kind: name of the type, such as ``IQ4_XS``.
    """
    if kind in TYPES:
        return TYPES[kind]
    try:
        import gguf  # type: ignore[import-not-found,unused-ignore]
        from gguf.quants import dequantize  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return None
    number = getattr(gguf.GGMLQuantizationType, kind, None)
    if number is None:
        return None
    size, nbytes = gguf.GGML_QUANT_SIZES[number]

    def numbers(raw: Tensor) -> Tensor:
        return torch.from_numpy(dequantize(raw.contiguous().numpy(), number)).view(len(raw), size)

    try:  # the package has no code for some types that it knows by name
        numbers(torch.zeros(1, nbytes, dtype=torch.uint8))
    except NotImplementedError:
        return None
    return Blocks(size, nbytes, numbers)
