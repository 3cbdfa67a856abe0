"""The base with the parts that it lacks and adapters bring: tensors of the output, as they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from loratool.adapter import Adapter, TensorRef
from loratool.archs.heads import class_of
from loratool.archs.stated import OUTPUT_KEYS, is_class_key
from loratool.bind.altered import Altered
from loratool.bind.new_parts import own_config
from loratool.errors import MismatchError, list_some
from loratool.frozen import replace
from loratool.ops.merge_parts import WeightedAdapter
from loratool.report.text import plural
from loratool.store.checkpoint import Checkpoint


def add_parts(bound: Iterable[WeightedAdapter], checkpoint: Checkpoint) -> Altered:
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
        return Altered(checkpoint)
    config, described = _described([o.adapter for o in owners.values()], checkpoint)
    return Altered(
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
