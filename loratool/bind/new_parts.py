"""Parts of a model that the base lacks and an adapter brings: a projector, a vision tower.

Trainers of vision models leave them beside the adapter.  They become tensors of the output, as
they are.  A name that looks like one of the base's is none of them: it is a name that went wrong.
"""

from __future__ import annotations

import difflib
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loratool.adapter import Adapter, Replacement, TensorRef
from loratool.archs.heads import class_of
from loratool.archs.stated import OUTPUT_KEYS, is_class_key
from loratool.errors import MismatchError, list_some
from loratool.frozen import Frozen, field, replace
from loratool.lazy import regex
from loratool.report.text import plural
from loratool.store.checkpoint import Checkpoint
from loratool.store.jsonfile import load_json
from loratool.store.layout import is_beside_name

if TYPE_CHECKING:
    from loratool.ops.merge_parts import WeightedAdapter

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


class Extended(Frozen):
    """A base with what it lacks and adapters bring: parts, or a head.

    Attributes:
        checkpoint: the base, under the names of the class that has a head if there is one; what is
            new lies in files of the adapters.
        created: names of the new tensors.
        config_changes: key of ``config.json`` -> value.
        notes: one sentence each.
        warnings: what the user should not overlook.
    """

    checkpoint: Checkpoint
    created: tuple[str, ...] = ()
    config_changes: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def add_parts(bound: Iterable[WeightedAdapter], checkpoint: Checkpoint) -> Extended:
    """Give a base the parts that it lacks.

    Args:
        bound: adapters with their bindings.
        checkpoint: the base that the bindings name.

    Raises:
        MismatchError: LT-428, two adapters bring the same one; LT-429, one is to be taken out.
    """
    owners: dict[str, WeightedAdapter] = {}
    tensors: dict[str, TensorRef] = {}
    for one in bound:
        for name, ref in _taken(one).items():
            if name in owners:
                raise MismatchError(
                    "LT-428", "two adapters bring what the base lacks",
                    file=one.adapter.path, key=name, got=owners[name].adapter.label,
                    hint=f"merge them one after the other, or --skip {ref.path.name}",
                )  # fmt: skip
            owners[name], tensors[name] = one, ref
    if not tensors:
        return Extended(checkpoint)
    config, described = _described([o.adapter for o in owners.values()], checkpoint)
    return Extended(
        replace(checkpoint, tensors={**checkpoint.tensors, **tensors}),
        tuple(tensors),
        config,
        (_said(tensors), *described),
        () if config else (_undescribed(tensors, checkpoint),),
    )


def _taken(one: WeightedAdapter) -> dict[str, TensorRef]:
    """New tensors of an adapter that count: those at weight 0 do not."""
    found = {}
    for name, (own, ref) in one.bindings.created.items():
        weight = one.weight.of(own)
        if weight < 0:
            raise MismatchError(
                "LT-429", "what is to be taken out is not in the base", file=one.adapter.path,
                key=name, got=f"weight {weight:g}", hint=f"--skip {ref.path.name} leaves it out",
            )  # fmt: skip
        if weight:
            found[name] = ref
    return found


def own_config(adapter: Adapter) -> dict[str, Any]:
    """The whole model's ``config.json`` that some trainers leave in the adapter's folder."""
    path = adapter.path / "config.json"
    return load_json(path) if path.is_file() else {}


def _described(
    adapters: Sequence[Adapter], checkpoint: Checkpoint
) -> tuple[dict[str, Any], list[str]]:
    """What the configurations of the trained models say otherwise, where they are other classes."""
    base = checkpoint.config
    changes: dict[str, Any] = {}
    for adapter in {a.path: a for a in adapters}.values():
        own = own_config(adapter)
        if class_of(own) in ("", class_of(base)):
            continue
        taken = {k: v for k, v in own.items() if k not in OUTPUT_KEYS and "." not in k}
        new = {k: v for k, v in taken.items() if k not in base or base[k] != v}
        for key in sorted(changes.keys() & new.keys()):
            if changes[key] != new[key]:
                raise MismatchError(
                    "LT-470", "adapters want different values in config.json", file=adapter.path,
                    key=key, expected=changes[key], got=new[key],
                    hint="merge them one after the other",
                )  # fmt: skip
        changes |= new
    if not changes:
        return {}, []
    rest = sorted(k for k in changes if not is_class_key(k))
    return changes, [
        f"config.json is of a {class_of(changes)}, as in the adapter's folder"
        + (f"; from there: {list_some(rest)}" if rest else "")
    ]


def _said(tensors: Mapping[str, TensorRef]) -> str:
    files = sorted({ref.path.name for ref in tensors.values()})
    size = sum(ref.nbytes for ref in tensors.values())
    return (
        f"new in the output, the base has nothing like it: {plural(len(tensors), 'tensor')} of "
        f"{list_some(files)} ({size:,} bytes): {_modules(tensors)}"
    )


def _modules(names: Iterable[str]) -> str:
    """The outermost modules that are told apart, with the number of tensors in each."""
    count = Counter(".".join(name.split(".")[:2]) for name in names)
    return list_some((f"{module} ({n})" for module, n in count.items()), 5)


def _undescribed(tensors: Mapping[str, TensorRef], checkpoint: Checkpoint) -> str:
    name = class_of(checkpoint.config) or "the plain base"
    return (
        f"config.json still describes {name}, which has no {_modules(tensors)}: a program that "
        "goes by it leaves them out; put the trained model's config.json into the adapter's "
        "folder, and it is used"
    )
