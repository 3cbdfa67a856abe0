"""Numbers in another order of their axes: strided copies, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Literal

from loratool.dtypes import numel

_Word = Literal["B", "H", "I", "Q"]
_WORDS: dict[int, _Word] = {1: "B", 2: "H", 4: "I", 8: "Q"}


def arrange(data: memoryview, laid: Sequence[int], axes: Sequence[int], size: int) -> bytearray:
    r"""The numbers of an array with its axes exchanged, one after another.

    The longest of the axes is copied in one go, so that thin factors take few steps.

    Args:
        data: bytes in the order of ``laid``.
        laid: sizes of the axes.
        axes: which of them comes first, second … in the result.
        size: bytes of a number: 1, 2, 4 or 8.

    Example:
        >>> bytes(arrange(memoryview(bytes([1, 2, 3, 4, 5, 6])), (2, 3), (1, 0), 1))
        b'\x01\x04\x02\x05\x03\x06'
    """
    out = bytearray(len(data))
    source = data.cast("B").cast(_WORDS[size])
    target = memoryview(out).cast(_WORDS[size])
    from_, to = _strides(laid), _strides([laid[axis] for axis in axes])
    steps = {axis: (from_[axis], to[place]) for place, axis in enumerate(axes)}
    longest = max(range(len(laid)), key=lambda axis: laid[axis])
    count, (read, write) = laid[longest], steps[longest]
    others = [axis for axis in range(len(laid)) if axis != longest]
    for at in product(*(range(laid[axis]) for axis in others)):
        first = sum(i * steps[axis][0] for i, axis in zip(at, others, strict=True))
        place = sum(i * steps[axis][1] for i, axis in zip(at, others, strict=True))
        target[place : place + count * write : write] = source[first : first + count * read : read]
    return out


def _strides(sizes: Sequence[int]) -> list[int]:
    """Numbers from one index of each axis to the next."""
    return [numel(tuple(sizes[axis + 1 :])) for axis in range(len(sizes))]
