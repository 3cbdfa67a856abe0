"""What a user should hear about inputs that are accepted: notes and warnings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from loratool.adapter import Adapter
from loratool.errors import list_some
from loratool.ops.inputs import OpenedAdapter, OpenedBase


def scaling_warnings(adapter: Adapter) -> list[str]:
    """Scalings that are allowed and rarely meant."""
    found = []
    zero = [spec for spec in adapter.specs if spec.rank and spec.scaling == 0]
    if zero:
        found.append(f"alpha 0: {len(zero)} of {len(adapter.specs)} modules have no effect")
    negative = [spec for spec in adapter.specs if spec.rank and spec.scaling < 0]
    if negative:
        found.append(f"negative alpha in {len(negative)} modules: they subtract")
    return found


def input_warnings(adapters: Iterable[OpenedAdapter]) -> list[str]:
    """`scaling_warnings` of several adapters, each with its name."""
    return [f"{a.adapter.label}: {w}" for a in adapters for w in scaling_warnings(a.adapter)]


def base_notes(adapters: Iterable[OpenedAdapter], base: OpenedBase) -> list[str]:
    """What is odd about the base, and adapters that name another one.

    Names rarely match (local paths, quantised twins), so a difference is no more than a note.
    """
    here = {_tail(str(base.resolved.named)), _tail(base.resolved.label.partition("@")[0])}
    return list(base.checkpoint.notes) + [
        f"{one.adapter.label} names {one.adapter.base_model} as its base, not "
        f"{base.resolved.label}: the names differ, the shapes fit"
        for one in adapters
        if one.adapter.base_model and _tail(one.adapter.base_model) not in here
    ]


def _tail(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()


def nonfinite_warning(results: Sequence[Any]) -> list[str]:
    """A sentence about the tensors that ``--allow-nonfinite`` let pass."""
    counts = {_of(r, "name"): _of(r, "nonfinite") for r in results if _of(r, "nonfinite")}
    if not counts:
        return []
    total = sum(counts.values())
    values = "value" if total == 1 else "values"
    return [f"{total} {values} of the output are NaN or infinity: {list_some(counts, 5)}"]


def _of(result: Any, key: str) -> Any:
    # Results of an interrupted run come back from its journal as dictionaries.
    return result.get(key) if isinstance(result, Mapping) else getattr(result, key, None)
