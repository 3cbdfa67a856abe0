"""Do adapters whose tensors differ make the same change?  By the products of their factors."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

import torch

from loratool.adapter import Adapter
from loratool.delta.forms import shape_of
from loratool.engine.opened import OpenAdapter, OpenModule

CLOSE = 1e-3
"""‖ΔW − ΔW'‖ / ‖ΔW‖ up to which two files hold one change: float16 factors of another scale have
4e-4 of it, two trainings of the same data some tenths."""
_FEW = 4

Pair = tuple[torch.Tensor, torch.Tensor]


def same_products(adapters: Sequence[Adapter]) -> list[list[int]]:
    """Groups of adapters with one change, by their places; those alone are in none.

    Modules are paired by name, or by shape and norm where they are called differently: two
    adapters are the same if every module has one of the other within `CLOSE`.

    Args:
        adapters: with changes of the same shapes; those that are not all low-rank are in no group.
    """
    found: list[tuple[int, OpenAdapter, list[float]]] = []
    groups: dict[int, list[int]] = defaultdict(list)
    for number, adapter in enumerate(adapters):
        if not all(s.is_pair and s.is_additive for s in adapter.specs):
            continue
        opened = OpenAdapter(adapter)
        few = sorted(_norm(_pair(m)) for m in _rarest(opened))
        for other, theirs, norms in found:
            near = all(
                math.isclose(a, b, rel_tol=2 * CLOSE) for a, b in zip(few, norms, strict=True)
            )
            if near and _is_same(opened, theirs):
                groups[other].append(number)
                break
        else:
            found.append((number, opened, few))
    return [[first, *others] for first, others in groups.items()]


def _rarest(adapter: OpenAdapter) -> list[OpenModule]:
    """The modules of the shape that the fewest have."""
    shapes = Counter(shape_of(m.spec) for m in adapter)
    least = min(shapes, key=lambda shape: (shapes[shape], shape))
    return [m for m in adapter if shape_of(m.spec) == least]


def _is_same(one: OpenAdapter, other: OpenAdapter) -> bool:
    named = {module.name: module for module in other}
    if named.keys() == {module.name for module in one}:
        return all(_is_close(_pair(module), _pair(named[module.name])) for module in one)
    left, right = _by_shape(one), _by_shape(other)
    return all(
        any(_is_close(pair, right[shape][n]) for n in _near(at, len(right[shape])))
        for shape, pairs in left.items() for at, pair in enumerate(pairs)
    )  # fmt: skip


def _near(place: int, count: int) -> Sequence[int]:
    """Places in the order of norms where the same change may stand: equal norms lie anyhow."""
    around = range(max(place - _FEW, 0), min(place + _FEW + 1, count))
    return sorted(around, key=lambda n: abs(n - place))


def _by_shape(adapter: OpenAdapter) -> dict[tuple[int, ...], list[Pair]]:
    found: dict[tuple[int, ...], list[tuple[float, Pair]]] = defaultdict(list)
    for module in adapter:
        pair = _pair(module)
        found[shape_of(module.spec)].append((_norm(pair), pair))
    return {s: [p for _, p in sorted(ps, key=lambda item: item[0])] for s, ps in found.items()}


def _pair(module: OpenModule) -> Pair:
    """(out, r) and (r, in) in float64, the scaling in the first."""
    return module.B.double().flatten(1) * module.scaling, module.A.double().flatten(1)


def _inner(one: Pair, other: Pair) -> float:
    """⟨B₁A₁, B₂A₂⟩ without forming the products."""
    return float(((one[0].mT @ other[0]) * (one[1] @ other[1].mT)).sum())


def _norm(pair: Pair) -> float:
    return math.sqrt(max(_inner(pair, pair), 0.0))


def _is_close(one: Pair, other: Pair) -> bool:
    size = _inner(one, one)
    apart = size - 2 * _inner(one, other) + _inner(other, other)
    return apart <= CLOSE**2 * size
