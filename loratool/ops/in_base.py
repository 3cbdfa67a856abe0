"""Where the changes of an adapter lie in its base, for arithmetic that needs both."""

from __future__ import annotations

from collections.abc import Mapping

from loratool.adapter import Adapter, DeltaSpec, TensorRef
from loratool.bind.bindings import bind
from loratool.bind.heads import take_heads
from loratool.frozen import Frozen
from loratool.ops.coded import read_plain
from loratool.ops.merge import matrix_view
from loratool.options.groups import Names
from loratool.plan import DeltaPart, Place
from loratool.store.checkpoint import Checkpoint


class InBase(Frozen):
    """An adapter in its base.

    Attributes:
        places: name of a spec -> its places, in the order of the experts.
        replaced: name of a replacement -> the tensor that it replaces; those that the base lacks
            are not here.
    """

    places: Mapping[str, tuple[Place, ...]]
    replaced: Mapping[str, TensorRef]


def find_in_base(adapter: Adapter, base: Checkpoint) -> InBase:
    """Bind an adapter to the numbers of a base, each tied tensor beside its own change.

    Raises:
        MismatchError: LT-499 weights in codes that cannot be read, or the adapter does not belong
            to the base.
    """
    base, _ = read_plain(base)
    headed = take_heads([adapter], base)
    bindings = bind(adapter, headed.checkpoint, Names(untie=True, resize_embeddings=True))
    tensors = (bindings.checkpoint or headed.checkpoint).tensors
    own = {b.target: b.replacement.source for b in bindings.replacements
           if b.replacement.rows is None}  # fmt: skip
    places: dict[str, list[Place]] = {}
    for bound in bindings.deltas:
        first = bindings.new_tensors.get(bound.target, bound.target)
        source = own.get(bound.target, tensors[first])
        part = DeltaPart(bound.spec, 1.0, bound.region, bound.expert, bound.transposed)
        place = Place(part, source, matrix_view(source.shape, [part]))
        places.setdefault(bound.spec.name, []).append(place)
    replaced = {}
    for item in bindings.replacements:
        target = bindings.new_tensors.get(item.target, item.target)
        if target in tensors and item.target not in headed.created:
            replaced[item.replacement.name] = item.old or tensors[target]
    return InBase(
        {name: tuple(sorted(found, key=lambda p: p.part.expert or 0))
         for name, found in places.items()},
        replaced,
    )  # fmt: skip


def is_whole(spec: DeltaSpec, places: tuple[Place, ...]) -> bool:
    """True if every matrix of the spec has one place, so that its factors can be exchanged."""
    is_cut = any(place.is_cut for place in places)
    return len(places) == max(1, spec.experts) and not is_cut and spec.blocks is None
