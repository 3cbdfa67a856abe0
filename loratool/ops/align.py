"""Which tensor of a fine-tune is which of its base, where the two were saved under other names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from loratool import archs
from loratool.adapter import TensorRef
from loratool.store.checkpoint import Checkpoint

_PREFIXES = ("model.", "transformer.", "base_model.", "encoder.", "module.")
"""Outer modules that one class of a model has and another lacks."""


def align_names(tuned: Checkpoint, base: Checkpoint) -> dict[str, TensorRef]:
    """The tensors of ``tuned`` under the names that ``base`` has for them.

    Equal names first; then equal names in memory (transformers 4 and 5 spell some differently);
    then, if it makes names agree, one outer module more or less.  A name without a partner stays.

    Args:
        tuned: the fine-tune.
        base: what it was tuned from.
    """
    have = base.tensors
    loose = [name for name in tuned.tensors if name not in have]
    taken = set(tuned.tensors) - set(loose)
    found = _by_memory(loose, [n for n in have if n not in taken], base.model_type)
    rest = [name for name in loose if name not in found]
    found |= _by_prefix(rest, [n for n in have if n not in taken | set(found.values())])
    return {found.get(name, name): ref for name, ref in tuned.tensors.items()}


def _by_memory(loose: Iterable[str], free: Iterable[str], model_type: str) -> dict[str, str]:
    in_memory = {archs.to_memory(model_type, name): name for name in free}
    found = {}
    for name in loose:
        partner = in_memory.get(archs.to_memory(model_type, name))
        if partner is not None:
            found[name] = partner
    return found


def _by_prefix(loose: list[str], free: list[str]) -> dict[str, str]:
    """One prefix for all: the one that finds the most partners."""
    names = set(free)
    shifts: Counter[tuple[str, str]] = Counter()
    for name in loose:
        for prefix in _PREFIXES:
            shifts[prefix, ""] += name.startswith(prefix) and name.removeprefix(prefix) in names
            shifts["", prefix] += prefix + name in names
    (cut, put), count = max(shifts.items(), key=lambda item: item[1], default=(("", ""), 0))
    if not count:
        return {}
    moved = {name: put + name.removeprefix(cut) for name in loose if name.startswith(cut)}
    return {name: other for name, other in moved.items() if other in names}


def renamed(aligned: Mapping[str, TensorRef]) -> int:
    """How many tensors go under another name than their own."""
    return sum(not name.endswith(ref.name) for name, ref in aligned.items())
