"""nf4 and fp4 of bitsandbytes: two codes in a byte, the first one in its upper half.

``X.weight`` holds the codes of the flattened weight, ``.absmax`` a factor for each block of
(often) 64, ``.quant_map`` the number that each code stands for,
``.quant_state.bitsandbytes__nf4`` shape and sizes as JSON.  Factors may be in
codes themselves: ``.absmax`` of 8 bits, ``.nested_quant_map``, ``.nested_absmax`` for each (often)
256 of them, and an offset.

A number is the float32 product of what its code stands for and its factor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from loratool.adapter import CodedRef, TensorRef
from loratool.dtypes import numel
from loratool.errors import BadFileError
from loratool.quant.base import Found, Reader, Tensors, coded, unfit
from loratool.quant.reading import fill, load, nibbles, raw

_STATE = ".quant_state.bitsandbytes__"
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_CODES = 16


def find(tensors: Tensors, config: Mapping[str, Any], reader: Reader) -> Found:
    """Every weight with a state of nf4 or fp4 beside it.

    Raises:
        BadFileError: LT-335.
    """
    weights: dict[str, CodedRef] = {}
    companions: set[str] = set()
    for state in (n for n in tensors if _STATE in n):
        name = state.partition(_STATE)[0]
        parts = {w: f"{name}.{w}" for w in _PARTS if f"{name}.{w}" in tensors}
        if name not in tensors:
            continue
        said = _read_state(tensors[state], reader)
        weights[name] = _coded(
            name, tensors[name], {w: tensors[n] for w, n in parts.items()}, said, tensors[state]
        )
        companions |= {state, *parts.values()}
    return Found(weights, frozenset(companions))


def _read_state(ref: TensorRef, reader: Reader) -> dict[str, Any]:
    try:
        said = json.loads(bytes(raw(ref, reader, 0, min(ref.nbytes, 1 << 16)).numpy()))
    except ValueError:
        said = None
    if not isinstance(said, dict):
        raise unfit(ref, "a JSON object", what="the state")
    return said


def _coded(
    name: str, ref: TensorRef, parts: Mapping[str, TensorRef], said: Mapping[str, Any],
    state: TensorRef,
) -> CodedRef:  # fmt: skip
    shape, size, nested = said.get("shape"), said.get("blocksize"), said.get("nested_blocksize", 1)
    offset = said.get("nested_offset", 0.0)
    is_clear = (
        isinstance(shape, list) and all(type(n) is int and n > 0 for n in shape)
        and all(type(n) is int and n > 0 for n in (size, nested))
        and isinstance(offset, (int, float))
    )  # fmt: skip
    if not is_clear:
        raise BadFileError(
            "LT-335", "the state of a quantised weight does not say what it must", file=ref.path,
            key=state.name, expected="shape and blocksize", got=str(dict(said))[:200],
            hint="download the checkpoint again",
        )  # fmt: skip
    assert isinstance(shape, list) and isinstance(size, int) and isinstance(nested, int)
    count = numel(tuple(shape))
    if ref.nbytes != -(-count // 2):
        raise unfit(ref, f"{-(-count // 2)} bytes for {shape}", what="the codes")
    blocks = -(-count // size)
    is_nested = "nested_absmax" in parts
    wanted = {"absmax": (blocks, "U8" if is_nested else "F32"), "quant_map": (_CODES, "F32")}
    if is_nested:
        wanted |= {"nested_absmax": (-(-blocks // nested), "F32"),
                   "nested_quant_map": (256, "F32")}  # fmt: skip
    for word, (numbers, dtype) in wanted.items():
        part = parts.get(word)
        if part is None or (part.numel, part.dtype) != (numbers, dtype):
            raise unfit(part or ref, f"{dtype} [{numbers}] in {word}")
    facts = {"size": size, "nested": nested, "offset": float(offset)}
    return coded("bnb4", name, ref, tuple(shape), others=parts, facts=facts)


def decode(ref: CodedRef, reader: Reader, start: int, buffer: memoryview) -> None:
    """As `loratool.quant.base.Coder.decode`."""
    table = load(dict(ref.others)["quant_map"], reader).float()
    cols = ref.shape[-1]

    def rows(first: int, last: int) -> torch.Tensor:
        return _numbers(ref, reader, table, first * cols, last * cols)

    fill(ref, start, buffer, rows)


def _numbers(
    ref: CodedRef, reader: Reader, table: torch.Tensor, first: int, last: int
) -> torch.Tensor:
    """Elements ``first`` to ``last`` of the flattened weight."""
    assert ref.codes is not None
    codes = nibbles(raw(ref.codes, reader, first // 2, -(-last // 2)), high_first=True)
    codes = codes[first % 2 : first % 2 + last - first]
    size = ref.fact("size")
    factors = _factors(ref, reader, first // size, -(-last // size))
    wide = factors.repeat_interleave(size)[first % size : first % size + last - first]
    return table[codes] * wide


def _factors(ref: CodedRef, reader: Reader, first: int, last: int) -> torch.Tensor:
    """Factors of some blocks, float32."""
    parts = dict(ref.others)
    absmax = parts["absmax"]
    width = 1 if absmax.dtype == "U8" else 4
    held = raw(absmax, reader, first * width, last * width)
    if width > 1:
        return held.view(torch.float32)
    scales = load(parts["nested_absmax"], reader).float()
    table = load(parts["nested_quant_map"], reader).float()
    at = torch.arange(first, last) // ref.fact("nested")
    return table[held.long()] * scales[at] + torch.tensor(ref.fact("offset"), dtype=torch.float32)
