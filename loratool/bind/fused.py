"""Separate projections on a fused base tensor, and fused ones on separate base tensors."""

from __future__ import annotations

from collections.abc import Mapping

from loratool.archs.fused import (
    FusedLeaf,
    fused_leaves,
    leaves_holding,
    part_leaves,
    part_of,
    part_spans,
)
from loratool.archs.layers import model_types, stores_transposed
from loratool.bind.items import BoundDelta, Found, Item, Misfit
from loratool.bind.place import Context, Placement, cut_groups, misfit, unmergeable
from loratool.delta.forms import shape_of, side_sizes
from loratool.plan import Region, Span


def place_fused(item: Item, name: str, ctx: Context) -> Placement | None:
    """Try both directions; None if no fused tensor is involved.

    Args:
        item: a delta with a linear or vector layout.
        name: full parameter name in the view of ``ctx``.
        ctx: the rule being tried.
    """
    return _onto_fused(item, name, ctx) or _onto_parts(item, name, ctx)


def _onto_fused(item: Item, name: str, ctx: Context) -> Placement | None:
    parent, leaf, kind = _split(name)
    part = part_of(leaf)
    if part is None:
        return None
    for fused in leaves_holding(part, ctx.config):
        target = ctx.view.get(fused.parameter(parent, kind))
        if target is not None:
            return _slice_of(item, part, fused, target, ctx)
    return None


def _slice_of(item: Item, part: str, fused: FusedLeaf, target: str, ctx: Context) -> Placement:
    spec = item.spec
    assert spec is not None
    problem = unmergeable(item, target, ctx)
    if problem is not None:
        return problem
    shape = ctx.shape(target)
    if not spec.is_matrix:
        size, turned = shape_of(spec)[0], True  # a bias lies along the columns
        if len(shape) != 1:
            return misfit(item, "LT-432", f"{shape}", f"({size},)", target)
    else:
        size, inner = side_sizes(spec)
        turned = bool(stores_transposed(ctx.config, target.rpartition(".")[0]))
        if len(shape) != 2 or inner != (shape[0 if turned else 1],):
            return misfit(item, "LT-432", f"{shape}", f"{(size, *inner)}", target)
        if turned and spec.scales_rows:
            return misfit(item, "LT-439", "slices of rows", "slices of columns", target)
    total = shape[-1] if turned else shape[0]
    spans = part_spans(fused, item.module, ctx.config, total, {part: size})
    if spans is None:
        return misfit(item, "LT-432", f"{part} inside {total} rows", f"{size} rows", target)
    region = Region(cols=spans[part]) if turned else Region(rows=spans[part])
    return Found(item, (BoundDelta(spec, target, region, transposed=_is_turned(item, turned)),))


def _onto_parts(item: Item, name: str, ctx: Context) -> Placement | None:
    parent, leaf, kind = _split(name)
    types = model_types(ctx.config)
    for fused in fused_leaves():
        if fused.leaf != leaf or not fused.holds_for(types):
            continue
        targets = {part: _part_target(parent, part, kind, ctx) for part in fused.parts}
        present = {part: target for part, target in targets.items() if target is not None}
        if len(present) == len(targets):
            return _spread(item, fused, present, ctx)
    return None


def _spread(item: Item, fused: FusedLeaf, targets: Mapping[str, str], ctx: Context) -> Placement:
    spec = item.spec
    assert spec is not None
    is_vector = not spec.is_matrix
    total = shape_of(spec)[0]
    for target in targets.values():
        problem = _part_problem(item, target, ctx)
        if problem is not None:
            return problem
    sizes = {part: ctx.shape(target)[0] for part, target in targets.items()}
    spans = part_spans(fused, item.module, ctx.config, total, sizes)
    if spans is None:
        return misfit(item, "LT-432", f"{sum(sizes.values())} rows", f"{total} rows", "")
    sources = [(span.start, span.stop) for found in spans.values() for span in found]
    if problem := cut_groups(item, spec, sources, ""):
        return problem
    deltas: list[BoundDelta] = []
    for part, target in targets.items():
        offset = 0
        for span in spans[part]:
            whole = len(spans[part]) == 1
            place = () if whole else (Span(offset, offset + len(span)),)
            source = (span.start, span.stop)
            region = (
                Region(cols=place, source_cols=source)
                if is_vector
                else Region(rows=place, source_rows=source)
            )
            deltas.append(BoundDelta(spec, target, region))
            offset += len(span)
    return Found(item, tuple(deltas))


def _part_problem(item: Item, target: str, ctx: Context) -> Misfit | None:
    spec = item.spec
    assert spec is not None
    problem = unmergeable(item, target, ctx)
    if problem is not None:
        return problem
    shape = ctx.shape(target)
    if not spec.is_matrix:
        return None if len(shape) == 1 else misfit(item, "LT-432", f"{shape}", "a vector", target)
    _, inner = side_sizes(spec)
    if stores_transposed(ctx.config, target.rpartition(".")[0]) or shape[1:] != inner:
        return misfit(item, "LT-432", f"{shape}", f"(…, {inner[0]})", target)
    return None


def _part_target(parent: str, part: str, kind: str, ctx: Context) -> str | None:
    for leaf in part_leaves(part):
        target = ctx.view.get(f"{parent}.{leaf}.{kind}" if parent else f"{leaf}.{kind}")
        if target is not None:
            return target
    return None


def _is_turned(item: Item, turned: bool) -> bool:
    assert item.spec is not None
    return turned and item.spec.is_matrix


def _split(name: str) -> tuple[str, str, str]:
    """(parent, leaf, ``weight`` or ``bias``) of a full parameter name."""
    module, _, kind = name.rpartition(".")
    if kind in ("in_proj_weight", "in_proj_bias"):
        return module, "in_proj", kind.removeprefix("in_proj_")
    parent, _, leaf = module.rpartition(".")
    return parent, leaf, kind
