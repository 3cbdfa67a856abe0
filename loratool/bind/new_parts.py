"""Parts of a model that the base lacks and an adapter brings: a projector, a vision tower.

Trainers of vision models leave them beside the adapter.  A name that looks like one of the base's
is none of them: it is a name that went wrong.
"""

from __future__ import annotations

import difflib
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from loratool.adapter import Adapter, Replacement, TensorRef
from loratool.lazy import regex
from loratool.store.jsonfile import load_json
from loratool.store.layout import is_beside_name

_ALIKE_SIBLINGS, _ALIKE_MODULES = 0.8, 0.7  # of difflib's ratio
_NUMBER = regex(r"\.\d+\.")
_MOST = 200  # words that one is compared with, letter by letter
_MOST_PARTS = 200  # different parts; more are no model's
_DEEPEST = 64  # parts of a name


def is_part(replacement: Replacement | None) -> bool:
    """True for a tensor that may be new: whole, from a file beside the adapter's own."""
    if replacement is None or replacement.rows is not None:
        return False
    source = replacement.source
    return isinstance(source, TensorRef) and is_beside_name(source.path.name)


class KnownNames:
    """The tensors of a base, asked whether another name looks like one of them.

    Args:
        shapes: name -> shape.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = shapes
        self._forward = sorted(shapes)
        self._backward = sorted(name[::-1] for name in shapes)
        self._layers = {name.rpartition(".")[0] for name in shapes}
        self._words: dict[tuple[int, ...], set[str]] = {}
        self._judged: dict[tuple[str, str], bool] = {}
        for name, shape in shapes.items():
            self._words.setdefault(shape, set()).update(name.split(".")[:-1])

    def are_unlike(self, name: str, shape: tuple[int, ...]) -> bool:
        """True for a name under a module that the base lacks, and that is no other spelling.

        Example:
            >>> known = KnownNames({"model.layers.0.up_proj.weight": (8, 8)})
            >>> known.are_unlike("model.mm_projector.0.weight", (8, 8))
            True
            >>> known.are_unlike("model.layer.0.up_proj.weight", (8, 8))
            False
        """
        parts = name.split(".")
        if len(parts) > _DEEPEST or name in self._shapes:
            return False
        depth = self._shared(name)
        parents = [".".join(parts[:n]) for n in range(1, depth + 1)]
        if depth == len(parts) or not self._layers.isdisjoint(parents):
            return False  # a module, or something inside a layer
        return not (
            self._is_misspelt("".join(f"{p}." for p in parts[:depth]), parts[depth])
            or self._is_other_place(parts, depth, shape)
            or self._is_other_module(parts[depth], shape)
        )

    def _shared(self, name: str) -> int:
        """How many leading parts the name shares with one of the base's: a neighbour of it."""
        at = bisect_left(self._forward, name)
        parts = name.split(".")
        return max(
            (_common(parts, other.split(".")) for other in self._forward[max(0, at - 1) : at + 1]),
            default=0,
        )

    def _is_misspelt(self, prefix: str, word: str) -> bool:
        """A layer's number that is too high, or a name like another one in the same module."""
        key = _NUMBER.sub(".0.", prefix), word  # layers have the same modules
        if key not in self._judged and len(self._judged) <= _MOST_PARTS:
            siblings = list(self._children(prefix))
            is_number = word.isdecimal() and any(map(str.isdecimal, siblings))
            self._judged[key] = is_number or _is_like(word, siblings, _ALIKE_SIBLINGS)
        return self._judged.get(key, True)

    def _children(self, prefix: str) -> Iterator[str]:
        at = bisect_left(self._forward, prefix)
        for _ in range(_MOST):
            if at == len(self._forward) or not self._forward[at].startswith(prefix):
                return
            child = self._forward[at][len(prefix) :].partition(".")[0]
            yield child
            at = bisect_left(self._forward, f"{prefix}{child}/", at)  # "/" follows "."

    def _is_other_place(self, parts: Sequence[str], depth: int, shape: tuple[int, ...]) -> bool:
        """The base has a tensor of this name with more, less or something else before it."""
        name = ".".join(parts)
        below = {".".join(parts[depth:]), ".".join(parts[depth + 1 :])} - {name}
        if any(n in self._shapes for n in below) or next(self._ending(f".{name}"), None):
            return True
        tail = parts[depth + 1 :]
        same = self._ending("".join(f".{p}" for p in tail)) if len(tail) > 2 else ()
        return any(self._shapes[other] == shape for other in same)

    def _ending(self, tail: str) -> Iterator[str]:
        turned = tail[::-1]
        at = bisect_left(self._backward, turned)
        for other in self._backward[at : at + _MOST]:
            if not other.startswith(turned):
                return
            yield other[::-1]

    def _is_other_module(self, word: str, shape: tuple[int, ...]) -> bool:
        """A module of the base has a name like it, and a tensor of this shape."""
        key = f"{shape}", word
        if key not in self._judged and len(self._judged) <= _MOST_PARTS:
            self._judged[key] = _is_like(word, self._words.get(shape, ()), _ALIKE_MODULES)
        return self._judged.get(key, True)


def _is_like(word: str, others: Iterable[str], ratio: float) -> bool:
    words = [other for other in sorted(others) if not other.isdecimal()]
    return bool(difflib.get_close_matches(word, words[:_MOST], 1, ratio))


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    for count, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return count
    return min(len(one), len(other))


def own_config(adapter: Adapter) -> dict[str, Any]:
    """The whole model's ``config.json`` that some trainers leave in the adapter's folder."""
    path = adapter.path / "config.json"
    return load_json(path) if path.is_file() else {}
