"""GPTQ: whole numbers of 2, 3, 4 or 8 bits, packed along the inputs.

``X.qweight`` (inputs in words, out), ``X.qzeros`` (groups, out in words), ``X.scales`` (groups,
out), ``X.g_idx`` (inputs): the group of each input.  The plain weight is ``X.weight`` (out, in).

A number is (code - zero) · scale.  In the first format of such files zeros are stored less one
(``checkpoint_format`` "gptq", or nothing said), in "gptq_v2" as they are.  The one is taken away
from each zero in a word at once, so that a zero of 0 borrows from the next; of 3 bits, which words
share, it becomes the largest (GPTQModel 7.7.0, ``utils/model.py``; transformers loads by it).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from loratool.adapter import CodedRef
from loratool.quant.base import Found, Reader, Tensors, coded, unfit
from loratool.quant.reading import fill, load, load_columns, unpack
from loratool.quant.recognize import settings

_BITS = (2, 3, 4, 8)
_FORMATS = ("gptq", "gptq_v2")
_PARTS = ("qzeros", "scales", "g_idx")


def find(tensors: Tensors, config: Mapping[str, Any], reader: Reader) -> Found:
    """Every ``qweight`` packed along its inputs.

    Raises:
        BadFileError: LT-335.
    """
    weights: dict[str, CodedRef] = {}
    companions: set[str] = set()
    if settings(config).get("checkpoint_format", _FORMATS[0]) not in _FORMATS:
        return Found()
    for name in tensors:
        stem = name.removesuffix("qweight")
        if stem == name or stem + "scales" not in tensors or stem + "qzeros" not in tensors:
            continue
        weights[stem + "weight"] = _coded(stem, tensors, settings(config))
        companions |= {stem + w for w in _PARTS if stem + w in tensors}
    return Found(weights, frozenset(companions))


def _coded(stem: str, tensors: Tensors, said: Mapping[str, Any]) -> CodedRef:
    codes, scales, zeros = (tensors[stem + w] for w in ("qweight", "scales", "qzeros"))
    order = tensors.get(stem + "g_idx")
    if len(codes.shape) != 2 or codes.dtype != "I32" or not codes.numel:
        raise unfit(codes, "I32, words of inputs × outputs", what="the codes")
    words, outs = codes.shape
    bits = said.get("bits")
    if bits not in _BITS or words * 32 % bits or (order and words * 32 != order.numel * bits):
        bits = words * 32 // order.numel if order and order.numel else 4
    if bits not in _BITS:
        raise unfit(order or codes, f"one for each of {words * 32 // _BITS[-1]} inputs or more",
                    what="the groups")  # fmt: skip
    inputs = words * 32 // bits
    if order is not None and (order.shape != (inputs,) or order.dtype not in ("I32", "I64")):
        raise unfit(order, f"I32 [{inputs}]", what="the groups")
    if len(scales.shape) != 2 or scales.shape[1] != outs:
        raise unfit(scales, f"groups × {outs}")
    if zeros.dtype != "I32" or zeros.shape != (scales.shape[0], -(-outs * bits // 32)):
        raise unfit(zeros, f"I32 {[scales.shape[0], -(-outs * bits // 32)]}", what="the zeros")
    size = said.get("group_size")
    each = size if type(size) is int and size > 0 else -(-inputs // max(1, scales.shape[0]))
    if order is None and -(-inputs // each) > scales.shape[0]:
        raise unfit(scales, f"{-(-inputs // each)} groups of {each}")
    is_less = said.get("checkpoint_format", _FORMATS[0]) == _FORMATS[0]
    facts = {"bits": bits, "size": each, "less": int(is_less)}
    others = {"scales": scales, "zeros": zeros, "order": order}
    return coded("gptq", stem + "weight", codes, (outs, inputs), others=others, facts=facts,
                 is_turned=True)  # fmt: skip


def decode(ref: CodedRef, reader: Reader, start: int, buffer: memoryview) -> None:
    """As `loratool.quant.base.Coder.decode`."""
    order = ref.other("order")
    inputs = torch.arange(ref.shape[1])
    groups = inputs // ref.fact("size") if order is None else load(order, reader).long()
    if len(groups) and not 0 <= int(groups.min()) <= int(groups.max()) < _parts(ref)[0].shape[0]:
        assert order is not None
        raise unfit(order, f"groups below {_parts(ref)[0].shape[0]}", what="the groups")

    def rows(first: int, last: int) -> torch.Tensor:
        return _numbers(ref, reader, groups, first, last)

    fill(ref, start, buffer, rows)


def _parts(ref: CodedRef) -> tuple[Any, Any]:
    parts = dict(ref.others)
    return parts["scales"], parts["zeros"]


def _zeros(words: torch.Tensor, bits: int, count: int, less: int) -> torch.Tensor:
    if not less or 32 % bits:
        return (unpack(words, bits, count) + less) & ((1 << bits) - 1)
    ones = sum(1 << at for at in range(0, 32, bits))
    return unpack((words.long() + ones).int(), bits, count)


def _numbers(
    ref: CodedRef, reader: Reader, groups: torch.Tensor, first: int, last: int
) -> torch.Tensor:
    """Some rows of the plain weight, which are columns of the codes."""
    assert ref.codes is not None
    bits = ref.fact("bits")
    scales, zeros = _parts(ref)
    packed = load_columns(ref.codes, reader, range(ref.codes.shape[0]), first, last)
    codes = unpack(packed.T.contiguous(), bits, ref.shape[1])
    all_groups = range(scales.shape[0])
    begin = first // 32 * 32  # where words of zeros begin
    w0, w1 = begin * bits // 32, min(zeros.shape[1], -(-last // 32) * bits)
    words = load_columns(zeros, reader, all_groups, w0, w1)
    zero = _zeros(words, bits, last - begin, ref.fact("less"))[:, first - begin :]
    scale = load_columns(scales, reader, all_groups, first, last).float()
    made: torch.Tensor = (codes - zero.T[:, groups]) * scale.T[:, groups]
    return made
