"""What adapters bring to each tensor of a base, and whether they agree."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from loratool.adapter import Adapter, DeltaSpec, Replacement
from loratool.bind.bindings import Bindings, BoundReplacement, bind
from loratool.bind.columns import COLUMNS
from loratool.delta.forms import shape_of
from loratool.errors import MismatchError, list_some
from loratool.frozen import Frozen, replace
from loratool.ops.align_parts import require_aligned
from loratool.ops.weights import Weight
from loratool.options.groups import Names
from loratool.plan import DeltaPart, Part, ReplacePart
from loratool.store.checkpoint import Checkpoint


class WeightedAdapter(Frozen):
    """An adapter as it takes part in a merge.

    Attributes:
        adapter: the adapter.
        weight: the user's coefficients.
        bindings: its targets in the base.
    """

    adapter: Adapter
    weight: Weight
    bindings: Bindings


class Changes(Frozen):
    """What adapters bring to a base, once they agree.

    Attributes:
        parts: tensor -> what is put into it, in the order of the adapters.
        new_tensors: tensors that the base lacks -> those that they begin as.
        grown: tables with rows for tokens that the base lacks -> rows in all.
        scales: tensor -> factor of the sum, before it is rounded.
        config_changes: dotted key of config.json -> value.
    """

    parts: Mapping[str, list[Part]]
    new_tensors: Mapping[str, str]
    grown: Mapping[str, int]
    scales: Mapping[str, float]
    config_changes: Mapping[str, Any]


def gather_changes(adapters: Sequence[WeightedAdapter], how: Mapping[str, Any]) -> Changes:
    """What every tensor of a base gets.

    Args:
        adapters: with their bindings.
        how: sums are rounded, and changes combined: of `loratool.ops.merge.plan_merge`.

    Raises:
        MismatchError: adapters want different things of one tensor, or what is asked for is not
            defined of their changes.
    """
    if how.get("rounding") == "exact":
        _require_sums(adapters)
    method = how.get("method")
    if method is not None:
        _require_additive(adapters, str(method))
    new_tensors, config_changes = _agreed(adapters)
    grown = _grown_rows(adapters)
    _check_columns(adapters)
    parts = _collect_parts(adapters, new_tensors, keep_all=method is not None)
    if method is not None:
        for name, found in parts.items():
            require_aligned(name, [p for p in found if isinstance(p, DeltaPart)], method)
    scales = {name: f for one in adapters for name, f in one.bindings.scales.items()}
    return Changes(parts, new_tensors, grown, scales, config_changes)


def _agreed(adapters: Sequence[WeightedAdapter]) -> tuple[dict[str, str], dict[str, Any]]:
    """New tensors -> what they begin as, and changes to the configuration.

    Raises:
        MismatchError: LT-470, two adapters want different ones.
    """
    new: dict[str, str] = {}
    config: dict[str, Any] = {}
    for one in adapters:
        for key, value in one.bindings.config_changes.items():
            if config.get(key, value) != value:
                raise MismatchError(
                    "LT-470", "adapters want different values in config.json",
                    file=one.adapter.path, key=key, expected=config[key], got=value,
                    hint="merge them one after the other",
                )  # fmt: skip
            config[key] = value
        new.update(one.bindings.new_tensors)
    return new, config


def _grown_rows(adapters: Sequence[WeightedAdapter]) -> dict[str, int]:
    """Tables with rows for tokens that the base lacks -> rows in all."""
    found: dict[str, int] = {}
    for one in adapters:
        for name, rows in one.bindings.grown.items():
            if name in found:
                raise MismatchError(
                    "LT-428", "two adapters bring what the base lacks", file=one.adapter.path,
                    key=name, got="rows for new tokens", hint="merge them one after the other",
                )  # fmt: skip
            _check_put_in(one, name, one.weight.value)
            found[name] = rows
    return found


def bind_weighted(
    adapter: Adapter, weight: Weight, checkpoint: Checkpoint, names: Names
) -> WeightedAdapter:
    """Bind an adapter; at weight 0 it makes nothing larger, since it has nothing to put there."""
    bindings = bind(adapter, checkpoint, names)
    larger = {b.target for b in bindings.replacements if b.replacement.origin == COLUMNS}
    larger |= bindings.grown.keys()
    if larger and not weight.value:
        idle = {b.spec.name for b in bindings.deltas if b.target in larger}
        idle |= {b.replacement.name for b in bindings.replacements if b.target in larger}
        adapter = replace(
            adapter,
            specs=tuple(s for s in adapter.specs if s.name not in idle or weight.of(s.name)),
            replacements=tuple(r for r in adapter.replacements if r.name not in idle),
        )
        bindings = bind(adapter, checkpoint, names)
    return WeightedAdapter(adapter, weight, bindings)


def _check_put_in(one: WeightedAdapter, name: str, weight: float) -> None:
    """Refuse to take out what the base lacks."""
    if weight < 0:
        raise MismatchError(
            "LT-429", "what is to be taken out is not in the base", file=one.adapter.path,
            key=name, got=f"weight {weight:g}", hint="leave the adapter out",
        )  # fmt: skip


def _check_columns(adapters: Sequence[WeightedAdapter]) -> None:
    """Refuse changes that do not fit a weight to which an adapter gives more columns."""
    wider: dict[str, tuple[int, ...]] = {}
    for one in adapters:
        for b in one.bindings.replacements:
            if b.replacement.origin == COLUMNS:
                put_in = [one.weight.of(d.spec.name) for d in one.bindings.deltas
                          if d.target == b.target]  # fmt: skip
                _check_put_in(one, b.target, min(put_in))
                wider[b.target] = b.replacement.source.shape
    for one in adapters if wider else ():
        own = {b.target: b.replacement.source.shape for b in one.bindings.replacements}
        for delta in one.bindings.deltas:
            target = delta.target
            if target in wider and own.get(target) != wider[target]:
                raise MismatchError(
                    "LT-428", "two adapters bring what the base lacks", file=one.adapter.path,
                    key=target, expected=f"a change of {list(wider[target])}",
                    got=list(own.get(target, shape_of(delta.spec))),
                    hint="merge them one after the other, the one with fewer columns first",
                )  # fmt: skip


def _collect_parts(
    adapters: Sequence[WeightedAdapter], new_tensors: Mapping[str, str], *, keep_all: bool
) -> dict[str, list[Part]]:
    """Parts by target; a tensor split off a tied one inherits what others do to the original.

    ``keep_all`` keeps deltas of weight 0 too: with some methods they vote.
    """
    parts: dict[str, list[Part]] = {}
    for number, one in enumerate(adapters):
        inherits = {
            source: name
            for name, source in new_tensors.items()
            if name not in one.bindings.new_tensors
        }
        found: list[tuple[str, Part]] = [
            (b.target, _replace_part(b.replacement, _weight_of(b, one), number))
            for b in one.bindings.replacements
        ]
        found += [
            (
                b.target,
                DeltaPart(
                    b.spec, one.weight.of(b.spec.name), b.region, b.expert, b.transposed, number
                ),
            )
            for b in one.bindings.deltas
        ]
        for target, part in found:
            if _has_effect(part) or (keep_all and isinstance(part, DeltaPart)):
                if _is_filled(part) and any(map(_is_filled, parts.get(target, ()))):
                    continue  # by another adapter, with the same zeros
                parts.setdefault(target, []).append(part)
                if target in inherits:
                    parts.setdefault(inherits[target], []).append(part)
    return parts


def _weight_of(bound: BoundReplacement, one: WeightedAdapter) -> float:
    """Rows and columns that the base lacks are taken whole, as every tensor that it lacks."""
    is_grown = bound.target in one.bindings.grown or bound.replacement.origin == COLUMNS
    return 1.0 if is_grown else one.weight.of(bound.replacement.name)


def _is_filled(part: Part) -> bool:
    return isinstance(part, ReplacePart) and part.origin == COLUMNS


def _replace_part(item: Replacement, weight: float, number: int) -> ReplacePart:
    return ReplacePart(item.source, weight, item.rows, number, item.origin)


def _has_effect(part: Part) -> bool:
    if isinstance(part, ReplacePart) or not part.spec.is_additive:
        return part.weight != 0
    return part.weight * part.spec.scaling != 0


def _named(adapters: Sequence[WeightedAdapter], test: Callable[[DeltaSpec], bool]) -> list[str]:
    """Changes of which something is true, in words."""
    return [
        f"{a.adapter.label}: {b.spec.name} ({b.spec.title})"
        for a in adapters
        for b in a.bindings.deltas
        if test(b.spec)
    ]


def _require_additive(adapters: Sequence[WeightedAdapter], method: str) -> None:
    """Refuse a method beside changes that depend on the base (LT-418)."""
    if other := _named(adapters, lambda s: not s.is_additive):
        raise MismatchError(
            "LT-418", f"{method} works on changes that do not depend on the base",
            key=list_some(other, 3), hint="leave --method out: their sum is defined",
        )  # fmt: skip


def _require_sums(adapters: Sequence[WeightedAdapter]) -> None:
    """Refuse exact rounding of what is no sum of products (LT-477).

    DoRA has a square root in it, PiSSA a decomposition, a Tucker core inner sums.
    """
    scaled = [f"{name} (scaled)" for one in adapters for name in one.bindings.scales]
    if other := [*_named(adapters, lambda s: not s.is_sum), *scaled]:
        raise MismatchError(
            "LT-477", "exact rounding is for sums of products, and this change is none",
            key=list_some(other), hint="leave --exact out",
        )  # fmt: skip
