"""Do two items of an adapter change a tensor alike, bit for bit?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from loratool.adapter import Adapter, DeltaSpec, Source
from loratool.bind.items import Found
from loratool.delta.forms import is_transposed
from loratool.dialects.rules import tied_pairs
from loratool.dialects.stated import untied
from loratool.frozen import replace
from loratool.store.reader import have_same_bytes, read_bytes

# Bytes of an element -> how its bits are compared.
_FORMATS: Mapping[int, Literal["B", "H", "I", "Q"]] = {1: "B", 2: "H", 4: "I", 8: "Q"}


def are_alike(first: Sequence[Found], second: Sequence[Found]) -> bool:
    """True if both are the same changes in the same order."""
    return len(first) == len(second) and all(map(_is_same, first, second))


def settle_tying(adapter: Adapter) -> Adapter:
    """The adapter, which states that embedding and head have one change only where they do.

    On a base that ties nothing PEFT trains two, whatever ``ensure_weight_tying`` says.
    """
    if all(_is_same_delta(*pair) for pair in tied_pairs(adapter)):
        return adapter
    return replace(adapter, config=untied(adapter.config))


def _is_same(first: Found, second: Found) -> bool:
    if first.item is second.item:
        return True
    if first.replacement is not None and second.replacement is not None:
        one, other = first.replacement.replacement, second.replacement.replacement
        return one.rows == other.rows and have_same_bytes([one.source, other.source])
    specs = first.item.spec, second.item.spec
    return specs[0] is not None and specs[1] is not None and _is_same_delta(specs[0], specs[1])


def _is_same_delta(first: DeltaSpec, second: DeltaSpec) -> bool:
    """Factors of an embedding make the transpose of what those of a linear layer make."""
    kinds = {(s.kind, s.scaling, s.title, s.blocks) for s in (first, second)}
    if len(kinds) > 1 or not first.row.has_factors or set(first.fields) != set(second.fields):
        return False
    if first.layout == second.layout:
        return all(have_same_bytes([first.fields[r], second.fields[r]]) for r in first.fields)
    if {first.layout, second.layout} != {"embedding", "linear"}:
        return False
    return is_transposed(first, second, _is_transpose)


def _is_transpose(first: Source, second: Source) -> bool:
    if first.dtype != second.dtype or first.shape != second.shape[::-1] or not first.numel:
        return False
    size = _FORMATS[first.nbytes // first.numel]
    rows, cols = first.shape
    one, other = memoryview(read_bytes(first)), memoryview(read_bytes(second))
    left, right = one.cast("B").cast(size), other.cast("B").cast(size)
    return all(left[i * cols : (i + 1) * cols] == right[i::rows] for i in range(rows))
