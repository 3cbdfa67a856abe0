"""Whole numbers of compressed-tensors that are packed, or have zero points.

``X.weight_packed`` (out, words), ``X.weight_shape``, ``X.weight_scale`` (out, groups), and where
they are there ``X.weight_zero_point`` (packed along the outputs) and ``X.weight_g_idx``, the group
of each input.  ``X.weight`` in 8 bits with ``X.weight_zero_point`` is read here too.

A number is (code - zero) · scale; packed codes and zeros are stored with half their range added.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from loratool.adapter import CodedRef, TensorRef
from loratool.quant.base import Found, Reader, Tensors, coded, columns_of, unfit
from loratool.quant.reading import fill, load, load_rows, unpack
from loratool.quant.schemes import group_size, groups

_BESIDE = (
    "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape", "input_scale",
    "input_zero_point", "input_global_scale",
)  # fmt: skip
_WORD = "I32"


def find(tensors: Tensors, config: Mapping[str, Any], reader: Reader) -> Found:
    """Every ``weight_packed`` of words, every 8-bit weight with zero points.

    Raises:
        BadFileError: LT-335.
    """
    weights: dict[str, CodedRef] = {}
    companions: set[str] = set()
    for name, ref in tensors.items():
        stem = name.removesuffix("weight_packed" if ref.dtype == _WORD else "weight")
        is_whole = ref.dtype == "I8" and f"{name}_zero_point" in tensors
        if stem == name or not (is_whole or ref.dtype == _WORD) \
                or stem + "weight_scale" not in tensors:  # fmt: skip
            continue
        parts = {w: tensors[stem + w] for w in _BESIDE if stem + w in tensors}
        shape = ref.shape if is_whole else _shape(ref, parts.get("weight_shape"), reader)
        bits = 8 if is_whole else _bits(ref, shape, config)
        weights[stem + "weight"] = _coded(stem + "weight", ref, shape, bits, parts, config)
        companions |= {stem + w for w in parts}
    return Found(weights, frozenset(companions))


def _shape(ref: TensorRef, stated: TensorRef | None, reader: Reader) -> tuple[int, ...]:
    if stated is None or stated.dtype not in ("I64", "I32") or stated.numel != len(ref.shape):
        raise unfit(stated or ref, "the sizes in weight_shape", what="the shape")
    shape = tuple(load(stated, reader).flatten().tolist())
    columns_of(ref)
    if shape[:-1] != ref.shape[:-1]:
        raise unfit(ref, f"{list(shape[:-1])} × words", what="the codes")
    return shape


def _bits(ref: TensorRef, shape: tuple[int, ...], config: Mapping[str, Any]) -> int:
    """Of one number; what the configuration says, where it fits, else what fits alone."""
    fitting = [b for b in range(1, 9) if -(-shape[-1] * b // 32) == ref.shape[-1]]
    said = [b for g in groups(config) if (b := g.get("num_bits")) in fitting]
    if not said and len(fitting) != 1:
        raise unfit(ref, f"words for rows of {shape[-1]} numbers", what="the codes")
    return int((said or fitting)[0])


def _coded(
    name: str, ref: TensorRef, shape: tuple[int, ...], bits: int,
    parts: Mapping[str, TensorRef], config: Mapping[str, Any],
) -> CodedRef:  # fmt: skip
    scales, zeros = parts["weight_scale"], parts.get("weight_zero_point")
    order = parts.get("weight_g_idx")
    outs, cols = shape[-2:] if len(shape) > 1 else (1, shape[0])
    count = scales.numel if scales.numel == 1 else scales.shape[-1]
    size = group_size(config)
    if not size or -(-cols // size) != count:
        size = -(-cols // max(1, count))
    rows = 1 if scales.numel == 1 else ref.numel // max(1, ref.shape[-1])
    if scales.numel != rows * count or (order is None and -(-cols // size) != count):
        raise unfit(scales, f"{rows} × groups of {cols} columns")
    if order is not None and order.numel != cols:
        raise unfit(order, [cols], what="the groups")
    if zeros is not None:
        want = scales.numel if zeros.dtype != _WORD else count * -(-outs * bits // 32)
        if zeros.numel != want or len(shape) > 2:
            raise unfit(zeros, f"{want} numbers", what="the zeros")
    return coded(
        "packed", name, ref, shape, facts={"bits": bits, "size": size},
        others={"scales": scales, "zeros": zeros, "order": order},
    )  # fmt: skip


def decode(ref: CodedRef, reader: Reader, start: int, buffer: memoryview) -> None:
    """As `loratool.quant.base.Coder.decode`."""
    scales, cols = dict(ref.others)["scales"], ref.shape[-1]
    count = 1 if scales.numel == 1 else scales.shape[-1]
    scale = load(scales, reader).float().view(-1, count)
    zero = _zeros(ref, reader, count)
    order = ref.other("order")
    at = torch.arange(cols) // ref.fact("size") if order is None else load(order, reader).long()
    if cols and not 0 <= int(at.min()) <= int(at.max()) < count:
        assert order is not None
        raise unfit(order, f"groups below {count}", what="the groups")

    def rows(first: int, last: int) -> torch.Tensor:
        codes = _codes(ref, reader, first, last)
        some = slice(first, last) if len(scale) > 1 else slice(0, 1)
        if zero is not None:
            codes = codes - zero[some][:, at]
        made: torch.Tensor = codes * scale[some][:, at]
        return made

    fill(ref, start, buffer, rows)


def _codes(ref: CodedRef, reader: Reader, first: int, last: int) -> torch.Tensor:
    assert ref.codes is not None
    held = load_rows(ref.codes, reader, first, last)
    if ref.codes.dtype != _WORD:
        return held.int()
    bits = ref.fact("bits")
    codes: torch.Tensor = unpack(held, bits, ref.shape[-1]) - (1 << (bits - 1))
    return codes


def _zeros(ref: CodedRef, reader: Reader, count: int) -> torch.Tensor | None:
    """(rows, groups), int32."""
    source = ref.other("zeros")
    if source is None:
        return None
    held, bits = load(source, reader), ref.fact("bits")
    if source.dtype != _WORD:
        return held.int().view(-1, count)
    words = held.view(-1, count).T.contiguous()
    zeros: torch.Tensor = unpack(words, bits, ref.shape[-2]) - (1 << (bits - 1))
    return zeros.T
