"""Replicated layers: a deeper stack whose tensors come from the layers of the base."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from loratool.archs.stated import layer_counts
from loratool.errors import MismatchError
from loratool.frozen import replace
from loratool.lazy import regex
from loratool.store.checkpoint import Checkpoint, Shard

_LAYER = regex(r"((?:.*?\.)?(?:layers|layer|h|blocks|block))\.(\d+)\.(.+)", re.DOTALL)


def replicate_layers(checkpoint: Checkpoint, order: Sequence[int]) -> Checkpoint:
    """A virtual checkpoint whose layer j is the base's layer ``order[j]``.

    Every tensor reference still points at the original bytes; only names change.  The shards
    keep their files and list the new names; their headers no longer describe them.

    Raises:
        MismatchError: LT-446, the base has no stack of layers that the order fits.
    """
    stack, depth = _stack(checkpoint, order)
    copies: dict[int, list[int]] = {}
    for new, old in enumerate(order):
        copies.setdefault(old, []).append(new)

    def renamed(name: str) -> list[str]:
        match = _LAYER.fullmatch(name)
        if match is None or match[1] != stack:
            return [name]
        return [f"{stack}.{new}.{match[3]}" for new in copies.get(int(match[2]), ())]

    sources = {new: old for old in checkpoint.tensors for new in renamed(old)}
    tensors = {new: checkpoint.tensors[sources[new]] for new in _in_order(sources, stack)}
    shards = tuple(_renamed_shard(shard, renamed) for shard in checkpoint.shards)
    return replace(
        checkpoint,
        shards=shards,
        tensors=tensors,
        notes=(*checkpoint.notes, f"layers of {stack} replicated: {depth} -> {len(order)}"),
    )


def _stack(checkpoint: Checkpoint, order: Sequence[int]) -> tuple[str, int]:
    """Path of the stack that the order means, and its depth."""
    found: Counter[str] = Counter()
    highest: dict[str, int] = {}
    for name in checkpoint.tensors:
        match = _LAYER.fullmatch(name)
        if match is not None:
            found[match[1]] += 1
            highest[match[1]] = max(highest.get(match[1], -1), int(match[2]))
    wanted = layer_counts(checkpoint.config)
    exact = [s for s in found if highest[s] + 1 in wanted]
    best = max(exact or list(found), key=lambda s: (found[s], s), default="")
    if not best or not order or max(order) > highest[best] or min(order) < 0:
        raise MismatchError(
            "LT-446",
            "layer_replication of the adapter does not fit the base",
            file=checkpoint.path,
            expected=f"layers 0 to {max(order, default=0)}",
            got=f"layers 0 to {highest[best]} of {best}" if best else "no stack of layers",
        )
    return best, highest[best] + 1


def _in_order(sources: Mapping[str, str], stack: str) -> list[str]:
    """New names in file order, the replicated layers by their new number."""
    numbers: dict[str, int] = {}
    first = None
    names = list(sources)
    for position, name in enumerate(names):
        match = _LAYER.fullmatch(name)
        if match is not None and match[1] == stack:
            numbers[name] = int(match[2])
            first = position if first is None else first
    layers = sorted(numbers, key=lambda name: numbers[name])
    before = [n for n in names[:first] if n not in numbers]
    after = [n for n in names[first or 0 :] if n not in numbers]
    return [*before, *layers, *after]


def _renamed_shard(shard: Shard, renamed: Any) -> Shard:
    keys = tuple(new for key in shard.keys for new in renamed(key))
    return replace(shard, keys=keys)
