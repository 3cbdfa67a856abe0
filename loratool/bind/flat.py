"""Flat names on the tensors of a base: looked up, never un-flattened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from loratool.archs.flat import FlatNames, Meaning, flat_names
from loratool.bind.items import BoundDelta, Found, Item
from loratool.bind.place import Context, Placement, misfit, unmergeable
from loratool.delta.forms import shape_of, side_sizes
from loratool.errors import MismatchError, list_some
from loratool.plan import Region, Span
from loratool.store.checkpoint import Checkpoint


def resolve_flat(items: Sequence[Item], checkpoint: Checkpoint, adapter: Path) -> list[Item]:
    """The items under the names that the base has for them; what it lacks keeps its own.

    Raises:
        MismatchError: LT-495, a name that several tensors of the base may go by.
    """
    index = flat_names(checkpoint.tensors)
    found, unclear = [], {}
    for item in items:
        meanings = meanings_of(item.name, index)
        if len(meanings) > 1:
            unclear[item.module] = meanings
        found.append(_named(item, meanings[0]) if meanings else item)
    if unclear:
        module, meanings = next(iter(unclear.items()))
        raise MismatchError(
            "LT-495", f"{len(unclear)} flat names may mean several tensors of the base",
            file=adapter, key=list_some(unclear), expected="one tensor",
            got=f"{module}: {' or '.join('+'.join(m.names) for m in meanings)}",
            hint="name the part of the base that the adapter is for, such as its unet folder",
        )  # fmt: skip
    return found


def meanings_of(name: str, index: FlatNames) -> list[Meaning]:
    """What the full name of a flat parameter may mean."""
    module, _, parameter = name.rpartition(".")
    component, _, flat = module.rpartition(".")
    return index.look_up(component, flat, parameter)


def _named(item: Item, meaning: Meaning) -> Item:
    if len(meaning.names) == 1 and not meaning.is_swapped:
        return replace(item, names=meaning.names)
    return replace(item, pieces=meaning.names, is_swapped=meaning.is_swapped)


def place_pieces(item: Item, ctx: Context) -> Placement:
    """One change of rows that the base has in several tensors, or in the other order."""
    spec = item.spec
    assert spec is not None
    targets = [ctx.view.get(name) for name in item.pieces]
    there = [t for t in targets if t is not None]
    total = shape_of(spec)[0]
    rows = [ctx.shape(t)[0] for t in there]
    if len(there) < len(targets) or sum(rows) != total:
        return misfit(item, "LT-432", f"{sum(rows)} rows", f"{total} rows", item.pieces[0])
    for target in there:
        if problem := unmergeable(item, target, ctx):
            return problem
        inner = side_sizes(spec)[1] if spec.is_matrix else ()
        if ctx.shape(target)[1:] != inner:
            return misfit(item, "LT-432", str(ctx.shape(target)), f"(…, {inner})", target)
    pieces = _halves(there[0], total) if item.is_swapped else _in_order(there, rows)
    return Found(item, tuple(
        BoundDelta(spec, target, _region(place, source, is_vector=not spec.is_matrix))
        for target, place, source in pieces
    ))  # fmt: skip


_Piece = tuple[str, tuple[Span, ...], tuple[int, int]]
"""Target, where in it, which rows of the change."""


def _in_order(targets: Sequence[str], rows: Sequence[int]) -> list[_Piece]:
    starts = [sum(rows[:i]) for i in range(len(rows))]
    return [(t, (), (s, s + n)) for t, s, n in zip(targets, starts, rows, strict=True)]


def _halves(target: str, total: int) -> list[_Piece]:
    half = total // 2
    return [
        (target, (Span(half, total),), (0, half)),
        (target, (Span(0, half),), (half, total)),
    ]


def _region(place: tuple[Span, ...], source: tuple[int, int], *, is_vector: bool) -> Region:
    if is_vector:  # a bias lies along the columns
        return Region(cols=place, source_cols=source)
    return Region(rows=place, source_rows=source)
