"""mxfp4 of gpt-oss: 4-bit floats, a power of two for each 32.

``X_blocks`` (experts, out, blocks, 16) holds two codes in a byte, the first one in its lower half,
``X_scales`` (experts, out, blocks) the exponents, 127 more than they are.  The plain weight is
``X`` (experts, in, out): the codes are turned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from loratool.adapter import CodedRef, TensorRef
from loratool.quant.base import Found, Reader, Tensors, coded, unfit
from loratool.quant.reading import fill, load_columns, nibbles

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
    return coded("mxfp4", name, ref, shape, others={"scales": scales}, is_turned=True)


def decode(ref: CodedRef, reader: Reader, start: int, buffer: memoryview) -> None:
    """As `loratool.quant.base.Coder.decode`."""

    def rows(first: int, last: int) -> torch.Tensor:
        matrix, first = divmod(first, ref.shape[-2])
        return turned(ref, reader, matrix, first, last - matrix * ref.shape[-2]).T

    fill(ref, start, buffer, rows)


def turned(ref: CodedRef, reader: Reader, matrix: int, first: int, last: int) -> torch.Tensor:
    """Inputs ``first`` to ``last`` of one matrix as its codes lie, (out, inputs), float32."""
    assert ref.codes is not None
    outs = ref.shape[-1]
    rows = range(matrix * outs, (matrix + 1) * outs)
    b0, b1 = first // _SIZE, -(-last // _SIZE)
    codes = _as_rows(ref.codes, ref.shape[-2] // 2)
    packed = load_columns(codes, reader, rows, b0 * _BYTES, b1 * _BYTES)
    powers = load_columns(dict(ref.others)["scales"], reader, rows, b0, b1)
    made = to_numbers(nibbles(packed), powers)
    return made[:, first - b0 * _SIZE : last - b0 * _SIZE]


def to_numbers(codes: torch.Tensor, powers: torch.Tensor) -> torch.Tensor:
    """(rows, n) codes and (rows, n/32) uint8 exponents -> (rows, n) float32."""
    table = torch.tensor([*NUMBERS, *(-n for n in NUMBERS)])
    values = torch.unflatten(table[codes], 1, (-1, _SIZE))
    return torch.ldexp(values, powers.int()[..., None] - _BIAS).flatten(1)


def _as_rows(ref: TensorRef, width: int) -> TensorRef:
    """A tensor of bytes seen with rows of another length."""
    return replace(ref, shape=(ref.nbytes // width, width))
