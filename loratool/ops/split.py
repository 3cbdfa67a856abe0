"""Which part of an adapter servers load, and which one they want in the base (data only)."""

from __future__ import annotations

from collections.abc import Sequence

from loratool.adapter import Adapter
from loratool.errors import MismatchError
from loratool.frozen import replace
from loratool.ops.leaving import less
from loratool.ops.merge_parts import WeightedAdapter


def for_the_base(adapter: Adapter) -> tuple[str, ...]:
    """Names of what goes into the base: replaced tensors, and changes of biases and norms.

    Raises:
        MismatchError: LT-448, there is no such part, or nothing else.
    """
    vectors = [spec.name for spec in adapter.specs if not spec.is_matrix]
    names = (*(r.name for r in adapter.replacements), *vectors)
    if not names:
        raise MismatchError(
            "LT-448", "nothing is left for the base: all of it is changes of weights",
            file=adapter.path, expected="replaced tensors, or changes of biases or norms",
        )  # fmt: skip
    if len(vectors) == len(adapter.specs):
        raise MismatchError(
            "LT-448", "nothing is left for an adapter: merge puts all of it into the base",
            file=adapter.path, expected="changes of weights",
        )  # fmt: skip
    return names


def for_servers(adapter: Adapter) -> Adapter:
    """The rest: changes of weights, also of those that PEFT stores a copy of beside its change."""
    matrices = tuple(spec for spec in adapter.specs if spec.is_matrix)
    return replace(less(adapter, for_the_base(adapter)), specs=matrices)


def without_weights(adapters: Sequence[WeightedAdapter]) -> tuple[WeightedAdapter, ...]:
    """The same adapters, without their changes of weights."""
    return tuple(
        replace(one, bindings=replace(
            one.bindings, deltas=tuple(d for d in one.bindings.deltas if not d.spec.is_matrix)
        ))
        for one in adapters
    )  # fmt: skip
