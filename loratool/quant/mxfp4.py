"""mxfp4 of gpt-oss: 4-bit floats, a power of two for each 32.

``X_blocks`` (experts, out, blocks, 16) holds two codes in a byte, the first one in its lower half,
``X_scales`` (experts, out, blocks) the exponents, 127 more than they are.  The plain weight is
``X`` (experts, in, out): the codes are turned.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch

from loratool.adapter import CodedRef, TensorRef
from loratool.frozen import replace
from loratool.quant.base import Found, Reader, Tensors, coded, unfit
from loratool.quant.reading import fill, load_columns, nibbles, raw

_CODES, _SCALES = "_blocks", "_scales"
_BIAS = 127
_SIZE, _BYTES = 32, 16
NUMBERS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What the codes 0 to 7 stand for; 8 to 15 are their negatives."""


def find(tensors: Tensors, config: Mapping[str, Any], reader: Reader) -> Found:
    """Every weight in blocks with exponents beside them.

    Raises:
        BadFileError: LT-335.
    """
    weights: dict[str, CodedRef] = {}
    scales: set[str] = set()
    for name, ref in tensors.items():
        plain = name.removesuffix(_CODES)
        beside = plain + _SCALES
        if plain != name and beside in tensors:
            weights[plain] = _coded(plain, ref, tensors[beside])
            scales.add(beside)
    return Found(weights, frozenset(scales))


def _coded(name: str, ref: TensorRef, scales: TensorRef) -> CodedRef:
    if ref.dtype != "U8" or len(ref.shape) < 3 or ref.shape[-1] != _BYTES:
        raise unfit(ref, f"U8, {_BYTES} bytes a block", what="the codes")
    if scales.dtype != "U8" or scales.shape != ref.shape[:-1]:
        raise unfit(scales, f"U8 {list(ref.shape[:-1])}")
    *stack, rows, blocks, _ = ref.shape
    shape = (*stack, blocks * _SIZE, rows)
    return coded("mxfp4", name, ref, shape, scales=scales, block=(1, _SIZE), is_turned=True)


def decode(ref: CodedRef, reader: Reader, start: int, buffer: memoryview) -> None:
    """As `loratool.quant.base.Coder.decode`."""

    def rows(first: int, last: int) -> torch.Tensor:
        matrix, first = divmod(first, ref.shape[-2])
        return _turned(ref, reader, matrix, first, last - matrix * ref.shape[-2]).T

    fill(ref, start, buffer, rows)


def _turned(ref: CodedRef, reader: Reader, matrix: int, first: int, last: int) -> torch.Tensor:
    """Inputs ``first`` to ``last`` of one matrix as its codes lie, (out, inputs), float32."""
    assert ref.codes is not None and ref.scales is not None
    outs = ref.shape[-1]
    rows = range(matrix * outs, (matrix + 1) * outs)
    b0, b1 = first // _SIZE, -(-last // _SIZE)
    codes = _as_rows(ref.codes, ref.shape[-2] // 2)
    packed = load_columns(codes, reader, rows, b0 * _BYTES, b1 * _BYTES)
    powers = load_columns(ref.scales, reader, rows, b0, b1)
    made = _to_numbers(nibbles(packed), powers)
    return made[:, first - b0 * _SIZE : last - b0 * _SIZE]


def _to_numbers(codes: torch.Tensor, powers: torch.Tensor) -> torch.Tensor:
    """(rows, n) codes and (rows, n/32) uint8 exponents -> (rows, n) float32."""
    table = torch.tensor([*NUMBERS, *(-n for n in NUMBERS)], device=codes.device)
    values = torch.unflatten(table[codes], 1, (-1, _SIZE))
    return torch.ldexp(values, powers.int()[..., None] - _BIAS).flatten(1)


def load_rows(ref: CodedRef, reader: Reader, first: int, last: int) -> torch.Tensor:
    """As `loratool.quant.base.RowCoder.load_rows`."""
    assert ref.codes is not None
    packed = _rows_of(_as_rows(ref.codes, ref.shape[-2] // 2), reader, first, last)
    return _to_numbers(nibbles(packed), load_factors(ref, reader, first, last))


def load_factors(ref: CodedRef, reader: Reader, first: int, last: int) -> torch.Tensor:
    """As `loratool.quant.base.RowCoder.load_factors`."""
    assert ref.scales is not None
    return _rows_of(ref.scales, reader, first, last)


def encode_rows(
    values: torch.Tensor, factors: torch.Tensor, ref: CodedRef
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The nearest codes, ties to even.  A power of two that holds its 32 numbers stays.

    Args:
        values: (rows, inputs) float64.
        factors: (rows, inputs/32) uint8, the old ones.
        ref: the weight.

    Returns:
        Codes (rows, inputs/2) uint8, factors, and the float32 numbers that they stand for.
    """
    blocks = torch.unflatten(values, 1, (-1, _SIZE))
    peaks = blocks.abs().amax(-1)
    old = factors.int() - _BIAS
    held = peaks <= torch.ldexp(torch.full_like(peaks, NUMBERS[-1]), old)
    powers = torch.where(held, old, _least(peaks))
    shares = torch.ldexp(blocks, -powers[..., None])
    sizes = torch.bucketize(shares.abs().contiguous(), _ends(shares))
    codes = (sizes + 8 * torch.signbit(shares)).flatten(1).to(torch.uint8)
    made = (powers + _BIAS).to(torch.uint8)
    return codes[:, ::2] | codes[:, 1::2] << 4, made, _to_numbers(codes.long(), made)


def _least(peaks: torch.Tensor) -> torch.Tensor:
    """The least power of two under which the largest code is not below, int32."""
    share, power = torch.frexp(peaks / NUMBERS[-1])
    return (power - (share == 0.5).int()).clamp(-_BIAS, _BIAS)


def _ends(like: torch.Tensor) -> torch.Tensor:
    """Up to which share each code is the nearest; the middle belongs to the even code."""
    middles = torch.tensor([(a + b) / 2 for a, b in pairwise(NUMBERS)], dtype=like.dtype)
    below = torch.nextafter(middles, torch.zeros_like(middles))
    is_odd = torch.arange(len(middles)) % 2 == 1  # the lower code; then the upper one is even
    return torch.where(is_odd, below, middles).to(like.device)


def _rows_of(ref: TensorRef, reader: Reader, first: int, last: int) -> torch.Tensor:
    width = ref.shape[-1]
    return raw(ref, reader, first * width, last * width).view(-1, width)


def _as_rows(ref: TensorRef, width: int) -> TensorRef:
    """A tensor of bytes seen with rows of another length."""
    return replace(ref, shape=(ref.nbytes // width, width))
