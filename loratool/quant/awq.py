"""AWQ: whole numbers of 4 bits, packed along the outputs, eight in a word in an order of their own.

``X.qweight`` (in, out/8), ``X.qzeros`` (groups, out/8), ``X.scales`` (groups, out).  The plain
weight is ``X.weight`` (out, in).  A number is (code - zero) · scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from loratool.adapter import CodedRef
from loratool.quant.base import Found, Reader, Tensors, coded, unfit
from loratool.quant.reading import fill, load_columns, unpack
from loratool.quant.recognize import settings

_BITS, _IN_WORD = 4, 8
_PLACE = (0, 4, 1, 5, 2, 6, 3, 7)  # of each of eight columns in its word


def find(tensors: Tensors, config: Mapping[str, Any], reader: Reader) -> Found:
    """Every ``qweight`` packed along its outputs.

    Raises:
        BadFileError: LT-335.
    """
    weights: dict[str, CodedRef] = {}
    companions: set[str] = set()
    if str(settings(config).get("version", "gemm")).lower() != "gemm":
        return Found()
    for name in tensors:
        stem = name.removesuffix("qweight")
        beside = {stem + "scales", stem + "qzeros"}
        if stem != name and beside <= set(tensors):
            weights[stem + "weight"] = _coded(stem, tensors)
            companions |= beside
    return Found(weights, frozenset(companions))


def _coded(stem: str, tensors: Tensors) -> CodedRef:
    codes, scales, zeros = (tensors[stem + w] for w in ("qweight", "scales", "qzeros"))
    if len(codes.shape) != 2 or codes.dtype != "I32" or not codes.numel:
        raise unfit(codes, "I32, inputs × words of outputs", what="the codes")
    inputs, words = codes.shape
    outs = words * _IN_WORD
    if len(scales.shape) != 2 or scales.shape[1] != outs or not scales.shape[0] \
            or inputs % scales.shape[0]:  # fmt: skip
        raise unfit(scales, f"groups of {inputs} inputs × {outs}")
    if zeros.dtype != "I32" or zeros.shape != (scales.shape[0], words):
        raise unfit(zeros, f"I32 {[scales.shape[0], words]}", what="the zeros")
    return coded("awq", stem + "weight", codes, (outs, inputs),
                 others={"scales": scales, "zeros": zeros}, is_turned=True)  # fmt: skip


def decode(ref: CodedRef, reader: Reader, start: int, buffer: memoryview) -> None:
    """As `loratool.quant.base.Coder.decode`."""

    def rows(first: int, last: int) -> torch.Tensor:
        return _numbers(ref, reader, first, last)

    fill(ref, start, buffer, rows)


def _numbers(ref: CodedRef, reader: Reader, first: int, last: int) -> torch.Tensor:
    """Some rows of the plain weight, which are columns of the codes."""
    assert ref.codes is not None
    scales, zeros = (dict(ref.others)[w] for w in ("scales", "zeros"))
    inputs, groups = ref.shape[1], scales.shape[0]
    w0, w1 = first // _IN_WORD, -(-last // _IN_WORD)
    codes, zero = (
        _in_order(load_columns(source, reader, range(source.shape[0]), w0, w1))
        for source in (ref.codes, zeros)
    )
    scale = load_columns(scales, reader, range(groups), w0 * _IN_WORD, w1 * _IN_WORD).float()
    each = inputs // groups
    made: torch.Tensor = (codes.view(groups, each, -1) - zero[:, None]) * scale[:, None]
    begin = first - w0 * _IN_WORD
    return made.view(inputs, -1)[:, begin : begin + last - first].T


def _in_order(words: torch.Tensor) -> torch.Tensor:
    """(rows, n) words -> (rows, 8·n) codes in the order of the columns."""
    found = unpack(words, _BITS, words.shape[1] * _IN_WORD)
    return torch.unflatten(found, 1, (-1, _IN_WORD))[..., list(_PLACE)].flatten(1)
