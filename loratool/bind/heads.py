"""An adapter that was trained with a head of its own, on a base that has another or none.

The base then becomes, in name only, what the adapter's model was: the body under the names that
the class has for it, the adapter's head, no other head.  Everything behind works on that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from loratool.adapter import Adapter, Source, TensorRef
from loratool.archs.heads import (
    has_pooler,
    is_language_model,
    is_other_head,
    is_pooler,
    label_config,
    label_count,
    task_class,
)
from loratool.archs.names import to_disk, to_memory
from loratool.archs.stated import class_config, model_type
from loratool.archs.ties import tied_tensors
from loratool.bind.altered import Altered
from loratool.bind.new_parts import is_part, own_config
from loratool.bind.user_names import parse_skip
from loratool.dialects.stated import WHOLE
from loratool.errors import MismatchError, list_some
from loratool.frozen import replace
from loratool.lazy import regex
from loratool.patterns import find
from loratool.report.text import plural
from loratool.store.checkpoint import Checkpoint

_LAYER = regex(r"\.\d+\.")


def take_heads(
    adapters: Iterable[Adapter], checkpoint: Checkpoint, skip: Sequence[str] = ()
) -> Altered:
    """Give a base the heads that adapters bring, and the class that goes with them.

    Args:
        adapters: those that count (not at weight 0).
        checkpoint: the base.
        skip: what the user leaves out, as in ``--skip``.

    Raises:
        MismatchError: LT-423, adapters bring different heads.
    """
    brought: dict[str, tuple[Adapter, dict[str, Source]]] = {}
    patterns = [parse_skip(text) for text in skip]
    for adapter in adapters:
        name = "" if checkpoint.components else task_class(adapter.config, checkpoint.config)
        head = _head(adapter, checkpoint, name) if name else {}
        skipped = frozenset().union(*find(patterns, [n.rpartition(".")[0] for n in head]))
        head = {n: source for n, source in head.items() if n.rpartition(".")[0] not in skipped}
        if not head:
            continue
        for other, (earlier, tensors) in brought.items():
            if other != name or tensors.keys() & head.keys():
                raise MismatchError(
                    "LT-423", "adapters bring heads of their own, and a model has one",
                    file=adapter.path, key=list_some(head), got=f"{earlier.label}: {other}, "
                    f"{adapter.label}: {name}", hint="--skip leaves one of them out",
                )  # fmt: skip
        brought[name] = (adapter, head)
    if not brought:
        return Altered(checkpoint)
    (name, (adapter, head)), *_ = brought.items()
    return _with_head(checkpoint, adapter, name, head)


def _head(adapter: Adapter, checkpoint: Checkpoint, class_name: str) -> dict[str, Source]:
    """Whole trained tensors that the base lacks, or has in another size."""
    known = _names(checkpoint)
    old, new = _body(adapter, checkpoint)
    found = {}
    for r in adapter.replacements:
        if r.origin != WHOLE or r.rows is not None:
            continue
        if is_part(r) and is_language_model(class_name):
            continue  # a projector beside a language model is no head
        twin = old + r.name.removeprefix(new) if r.name.startswith(new) else r.name
        name = known.get(r.name) or known.get(twin)
        if name is None:
            if not (r.name.startswith(new or "\0") and _LAYER.search(r.name)):
                found[r.name] = r.source
        elif is_other_head(name) and checkpoint.tensors[name].shape != r.source.shape:
            found[r.name] = r.source
    return found


def _names(checkpoint: Checkpoint) -> dict[str, str]:
    """Names that the base's tensors go by, in files or in memory, tied ones too -> a stored one."""
    found = tied_tensors(checkpoint)
    for name in (*found, *checkpoint.tensors):
        stored = found.get(name, name)
        found.setdefault(name, stored)
        found.setdefault(to_memory(model_type(checkpoint.config), name), stored)
    return found


def _body(adapter: Adapter, checkpoint: Checkpoint) -> tuple[str, str]:
    """(first part of the base's names, first part that the adapter has there): equal mostly."""
    known = _names(checkpoint)
    names = [s.name for s in adapter.specs]
    outer = {f"{n.partition('.')[0]}." for n in checkpoint.tensors}
    votes: Counter[tuple[str, str]] = Counter()
    for name in names:
        if name in known:
            votes["", ""] += 1
            continue
        first, _, rest = name.partition(".")
        votes.update((old, f"{first}.") for old in ("", *sorted(outer)) if old + rest in known)
    best = max(votes.items(), key=lambda v: (v[1], v[0] == ("", "")), default=(("", ""), 0))
    return best[0]


def _with_head(
    checkpoint: Checkpoint, adapter: Adapter, name: str, head: Mapping[str, Source]
) -> Altered:
    old, new = _body(adapter, checkpoint)
    own = {r.name for r in adapter.replacements}
    pooler = has_pooler(name)
    names: dict[str, str] = {}
    left: list[str] = []
    for stored in checkpoint.tensors:
        renamed = new + stored.removeprefix(old) if stored.startswith(old) else stored
        idle = is_pooler(stored) and pooler is False
        if (is_other_head(stored) or idle) and not own & _spellings(checkpoint, renamed):
            left.append(stored)
        elif renamed not in head:
            names[stored] = renamed
    tensors = {names[n]: ref for n, ref in checkpoint.tensors.items() if n in names}
    tensors |= {n: source for n, source in head.items() if isinstance(source, TensorRef)}
    shards = tuple(
        replace(s, keys=tuple(names[k] for k in s.keys if k in names)) for s in checkpoint.shards
    )
    config = {**checkpoint.config, **class_config(name)}
    count = label_count(name, {n: s.shape for n, s in head.items()})
    changes = {**class_config(name), **_labels(adapter, checkpoint, count)}
    lacks = pooler is True and not any(map(is_pooler, tensors))
    return Altered(
        replace(checkpoint, tensors=tensors, shards=shards, config=config),
        tuple(head),
        {k: v for k, v in changes.items() if checkpoint.config.get(k) != v},
        (_said(name, head, left, count),),
        (f"{name} has a pooler, which neither base nor adapter holds: it will be random",)
        if lacks else (),
    )  # fmt: skip


def _spellings(checkpoint: Checkpoint, name: str) -> set[str]:
    kind = model_type(checkpoint.config)
    return {name, to_memory(kind, name), *to_disk(kind, name)}


def _labels(adapter: Adapter, checkpoint: Checkpoint, count: int | None) -> dict[str, Any]:
    if count is None:
        return {}
    listed = own_config(adapter).get("id2label")
    called = listed.values() if isinstance(listed, Mapping) else ()
    return label_config(checkpoint.config, count, called)


def _said(name: str, head: Collection[str], left: Sequence[str], count: int | None) -> str:
    labels = f" with {plural(count, 'label')}" if count is not None else ""
    parts = sorted({n.partition(".")[0] for n in head})
    said = f"the head of the adapter ({', '.join(parts)}) makes the output a {name}{labels}"
    return f"{said}; left out of the base: {list_some(left, 3)}" if left else said
