"""Whole numbers of 2 to 8 bits as mlx packs them, with a factor and an offset for each group.

``X.weight`` (out, words), ``X.scales`` and ``X.biases`` (out, groups).  A number is
scale · code + bias.  Bits and group size are in ``quantization`` of the configuration, for some
modules under their own names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from loratool.adapter import CodedRef
from loratool.errors import BadFileError
from loratool.quant.base import Found, Reader, Tensors, coded, columns_of, unfit
from loratool.quant.reading import fill, load_rows, unpack
from loratool.quant.recognize import settings

_BITS = (2, 3, 4, 5, 6, 8)


def find(tensors: Tensors, config: Mapping[str, Any], reader: Reader) -> Found:
    """Every weight in words with factors and offsets beside it.

    Raises:
        BadFileError: LT-335.
    """
    weights: dict[str, CodedRef] = {}
    companions: set[str] = set()
    said = settings(config)
    for name, ref in tensors.items():
        stem = name.removesuffix("weight")
        beside = {stem + "scales", stem + "biases"}
        if ref.dtype == "U32" and stem != name and beside <= set(tensors):
            own = said.get(stem.removesuffix("."))
            weights[name] = _coded(name, tensors, own if isinstance(own, Mapping) else said)
            companions |= beside
    return Found(weights, frozenset(companions))


def _coded(name: str, tensors: Tensors, said: Mapping[str, Any]) -> CodedRef:
    stem = name.removesuffix("weight")
    codes, scales, biases = (tensors[stem + w] for w in ("weight", "scales", "biases"))
    bits, size = said.get("bits"), said.get("group_size", 64)
    if bits not in _BITS or type(size) is not int or size < 1:
        raise BadFileError(
            "LT-335", "the configuration does not say how a weight is quantised", file=codes.path,
            key=name, expected="bits and group_size", got=str(dict(said))[:200],
        )  # fmt: skip
    assert isinstance(bits, int)
    cols = columns_of(codes) * 32 // bits
    shape = (*codes.shape[:-1], cols)
    for beside in (scales, biases):
        if beside.shape != (*shape[:-1], -(-cols // size)):
            raise unfit(beside, [*shape[:-1], -(-cols // size)])
    return coded("mlx", name, codes, shape, others={"scales": scales, "biases": biases},
                 facts={"bits": bits, "size": size})  # fmt: skip


def decode(ref: CodedRef, reader: Reader, start: int, buffer: memoryview) -> None:
    """As `loratool.quant.base.Coder.decode`."""
    parts = dict(ref.others)

    def rows(first: int, last: int) -> torch.Tensor:
        assert ref.codes is not None
        cols = ref.shape[-1]
        codes = unpack(load_rows(ref.codes, reader, first, last), ref.fact("bits"), cols)
        scale, bias = (
            load_rows(parts[w], reader, first, last).float()
            .repeat_interleave(ref.fact("size"), 1)[:, :cols] for w in ("scales", "biases")
        )  # fmt: skip
        return codes * scale + bias

    fill(ref, start, buffer, rows)
