"""Element-wise methods into a base: which changes meet on the same elements of a tensor."""

from __future__ import annotations

from collections.abc import Sequence

from loratool.errors import MismatchError, list_some
from loratool.plan import DeltaPart, Region, Span


def require_aligned(name: str, parts: Sequence[DeltaPart], method: str) -> None:
    """Refuse changes of one tensor that a method could not set side by side, element by element.

    Changes of the same rows and columns are combined; all others must not touch each other.

    Args:
        name: of the tensor.
        parts: every change of it.
        method: for the message.

    Raises:
        MismatchError: LT-418, changes that overlap without being of the same elements, lie in
            different orientations or parts of a matrix, or belong to one adapter.
    """
    groups: dict[tuple[tuple[Span, ...], tuple[Span, ...]], list[DeltaPart]] = {}
    for part in parts:
        groups.setdefault((part.region.rows, part.region.cols), []).append(part)
    odd = [
        p.spec.name
        for group in groups.values()
        for p in group
        if _form(p) != _form(group[0]) or sum(o.adapter == p.adapter for o in group) > 1
    ]
    odd += _overlapping([group[0] for group in groups.values()])
    if odd:
        raise MismatchError(
            "LT-418", f"{method} needs changes of the same elements in the same form", key=name,
            got=list_some(set(odd), 4), hint="leave --method out: their sum is defined; or --untie",
        )  # fmt: skip


def _form(part: DeltaPart) -> tuple[object, ...]:
    return part.transposed, part.region.source_rows, part.region.source_cols


def _overlapping(parts: Sequence[DeltaPart]) -> list[str]:
    """Names of parts whose rows and columns meet those of another one."""
    found: list[str] = []
    active: list[DeltaPart] = []
    for part in sorted(parts, key=lambda p: _first(p.region.rows)):
        active = [p for p in active if _last(p.region.rows) > _first(part.region.rows)]
        for other in active:
            if _meet(part.region, other.region):
                found += [part.spec.name, other.spec.name]
        active.append(part)
    return found


def _meet(one: Region, other: Region) -> bool:
    return all(
        not a or not b or any(_common(x, y) for x in a for y in b)
        for a, b in ((one.rows, other.rows), (one.cols, other.cols))
    )


def _common(one: Span, other: Span) -> bool:
    start, stop = max(one.start, other.start), min(one.stop, other.stop)
    if start >= stop or one.step == other.step == 1:
        return start < stop
    return not set(range(one.start, one.stop, one.step)).isdisjoint(
        range(other.start, other.stop, other.step)
    )


def _first(spans: Sequence[Span]) -> int:
    return min((s.start for s in spans), default=0)


def _last(spans: Sequence[Span]) -> float:
    return max((s.stop for s in spans), default=float("inf"))
