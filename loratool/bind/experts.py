"""Mixture-of-experts deltas: flattened over all experts, or one module per expert.

A flattened pair of factors belongs to a parameter (E, d1, d2).  ``eoi`` means that it is
stored (E, out, in), ``eio`` that it is (E, in, out); the shapes decide, and only where
d1 == d2 the PEFT version does.
"""

from __future__ import annotations

from loratool.adapter import DeltaSpec
from loratool.archs.experts import ExpertName, expert_names, fused_names, parse_expert
from loratool.archs.layers import (
    experts_lie_turned,
    has_flipped_experts,
    has_interleaved_experts,
    has_transposed_experts,
)
from loratool.bind.items import BoundDelta, Found, Item, Misfit
from loratool.bind.place import Context, Placement, misfit, unmergeable
from loratool.delta.forms import side_sizes
from loratool.dialects.peft.version import parse_version
from loratool.frozen import Frozen
from loratool.plan import Region, Span


class _Slot(Frozen):
    """Where one part of one expert is stored.

    Attributes:
        target: tensor in the files.
        rows: rows of its 2-D view; () = all.
        cols: columns; () = all.
        shape: (d1, d2) of the slot.
    """

    target: str
    rows: tuple[Span, ...]
    cols: tuple[Span, ...]
    shape: tuple[int, int]


def place_flat(item: Item, name: str, ctx: Context) -> Placement:
    """Factors of every expert at once (``layout`` "experts")."""
    spec = item.spec
    assert spec is not None
    target = ctx.view.get(name)
    if target is not None and len(ctx.shape(target)) == 3:
        return _on_fused(item, spec, target, ctx)
    expert = parse_expert(name)
    if expert is None or expert.expert is not None:
        return Misfit(item, "name")
    return _on_separate(item, spec, expert, ctx)


def place_single(item: Item, name: str, ctx: Context) -> Placement | None:
    """A module of one expert (``experts.3.w1``) on a base that names or stores it otherwise."""
    spec = item.spec
    expert = parse_expert(name)
    if spec is None or expert is None or expert.expert is None or spec.layout != "linear":
        return None
    if len(expert.parts) > 1:
        slot = _whole_slot(expert.container, expert.expert, expert.parts, ctx)
    else:
        slot = _slot(expert.container, expert.expert, expert.parts[0], ctx)
    if slot is None:
        return None
    problem = unmergeable(item, slot.target, ctx)
    if problem is not None:
        return problem
    out, inner = side_sizes(spec)
    turned = _is_stored_turned(slot, (out, *inner), ctx)
    if turned is None:
        return misfit(item, "LT-437", f"{slot.shape}", f"{(out, *inner)}", slot.target)
    if turned and spec.scales_rows:
        return misfit(item, "LT-439", "slices of rows", "slices of columns", slot.target)
    region = Region(rows=slot.rows, cols=slot.cols)
    return Found(item, (BoundDelta(spec, slot.target, region, transposed=turned),))


def _on_fused(item: Item, spec: DeltaSpec, target: str, ctx: Context) -> Placement:
    problem = unmergeable(item, target, ctx)
    if problem is not None:
        return problem
    count, d1, d2 = ctx.shape(target)
    turned = _layout(item, spec, (count, d1, d2), target, ctx)
    if isinstance(turned, Misfit):
        return turned
    deltas = tuple(
        BoundDelta(spec, target, Region(rows=(Span(e * d1, (e + 1) * d1),)), e, turned)
        for e in range(count)
    )
    return Found(item, deltas)


def _on_separate(item: Item, spec: DeltaSpec, expert: ExpertName, ctx: Context) -> Placement:
    """Every expert has its own tensors: slice the flattened delta per expert and part."""
    slots = [
        [_slot(expert.container, e, part, ctx) for part in expert.parts]
        for e in range(spec.experts)
    ]
    found = [slot for row in slots for slot in row if slot is not None]
    if not found:
        return Misfit(item, "name")
    if len(found) != spec.experts * len(expert.parts):
        got = f"{len(found)} of {spec.experts * len(expert.parts)} tensors"
        return misfit(item, "LT-437", f"{spec.experts} experts", got, expert.container)
    if _slot(expert.container, spec.experts, expert.parts[0], ctx) is not None:
        got = f"{spec.experts} experts"
        return misfit(item, "LT-437", "as many experts as the base", got, expert.container)
    widths = {slot.shape[1] for slot in found}
    heights = [slot.shape[0] for slot in found[: len(expert.parts)]]
    whole = (spec.experts, sum(heights), min(widths))
    turned = _layout(item, spec, whole, found[0].target, ctx)
    if isinstance(turned, Misfit):
        return turned
    deltas: list[BoundDelta] = []
    for e, row in enumerate(slots):
        start = 0
        for slot, first in zip(row, found, strict=False):  # all experts have the first's shapes
            assert slot is not None
            problem = unmergeable(item, slot.target, ctx)
            if problem is not None or slot.shape != first.shape or len(widths) > 1:
                return problem or misfit(item, "LT-437", f"{whole}", f"{slot.shape}", slot.target)
            source = (start, start + slot.shape[0]) if len(row) > 1 else None
            region = Region(rows=slot.rows, cols=slot.cols, source_rows=source)
            deltas.append(BoundDelta(spec, slot.target, region, e, turned))
            start += slot.shape[0]
    return Found(item, tuple(deltas))


def _layout(
    item: Item, spec: DeltaSpec, shape: tuple[int, int, int], target: str, ctx: Context
) -> bool | Misfit:
    """False for ``eoi``, True for ``eio``, or why neither fits."""
    count, d1, d2 = shape
    out, inner = side_sizes(spec)
    got = f"{spec.experts} experts, ({out}, {', '.join(map(str, inner))})"
    expected = f"{count} experts, ({d1}, {d2})"
    fits = {"eoi": (out, *inner) == (d1, d2), "eio": (*inner, out) == (d1, d2)}
    asked = ctx.options.moe_layout
    if spec.experts != count or not any(fits.values()) or (asked and not fits[asked]):
        return misfit(item, "LT-437", expected, got, target)
    if asked:
        return asked == "eio"
    if d1 != d2:
        return fits["eio"]
    square = _square_layout(ctx)
    if square is None:
        return misfit(item, "LT-436", expected, got, target)
    return square == "eio"


def _square_layout(ctx: Context) -> str | None:
    """Layout by PEFT version where the shape says nothing (see dialects_llm §2.4)."""
    number = parse_version(ctx.peft_version)
    if number is None or has_flipped_experts(ctx.config):
        return None
    turned = has_transposed_experts(ctx.config)
    if number < (0, 19, 0):
        return "eio"
    if number == (0, 19, 0):
        turned = not turned  # 0.19.0 had the test the wrong way round
    return "eio" if turned else "eoi"


def _slot(container: str, expert: int, part: str, ctx: Context) -> _Slot | None:
    for name in expert_names(container, expert, part):
        target = ctx.view.get(name)
        if target is not None and len(ctx.shape(target)) == 2:
            d1, d2 = ctx.shape(target)
            return _Slot(target, (), (), (d1, d2))
    for name, parts in fused_names(container, part):
        target = ctx.view.get(name)
        if target is not None and len(ctx.shape(target)) == 3:
            return _fused_slot(target, expert, parts.index(part), len(parts), ctx)
    return None


def _whole_slot(container: str, expert: int, parts: tuple[str, ...], ctx: Context) -> _Slot | None:
    """All parts of one expert, in the order in which the base's fused tensor holds them."""
    for name, held in fused_names(container, parts[0]):
        target = ctx.view.get(name)
        if target is not None and held == parts and len(ctx.shape(target)) == 3:
            return _fused_slot(target, expert, 0, 1, ctx)
    return None


def _fused_slot(target: str, expert: int, position: int, count: int, ctx: Context) -> _Slot | None:
    experts, d1, d2 = ctx.shape(target)
    if expert >= experts:
        return None
    first = expert * d1
    turned = experts_lie_turned(ctx.config, target, (experts, d1, d2))
    if count == 1:
        return _Slot(target, (Span(first, first + d1),), (), (d1, d2))
    if not turned:
        part = d1 // count
        start = first + position * part
        return _Slot(target, (Span(start, start + part),), (), (part, d2))
    part = d2 // count
    if has_interleaved_experts(ctx.config):
        cols = Span(position, d2, count)
    else:
        cols = Span(position * part, (position + 1) * part)
    return _Slot(target, (Span(first, first + d1),), (cols,), (d1, part))


def _is_stored_turned(slot: _Slot, asked: tuple[int, ...], ctx: Context) -> bool | None:
    """Is the slot stored (in, out)?  None if the delta does not fit."""
    is_part_of_fused = bool(slot.rows)
    turned = is_part_of_fused and experts_lie_turned(
        ctx.config, slot.target, ctx.shape(slot.target)
    )
    return turned if (asked[::-1] if turned else asked) == slot.shape else None
