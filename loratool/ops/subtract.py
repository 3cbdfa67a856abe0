"""What can be taken out of merged weights without the base, and what cannot."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from loratool.adapter import Adapter
from loratool.bind.columns import may_have_grown
from loratool.errors import LoratoolError, MismatchError, list_some
from loratool.frozen import replace
from loratool.ops.merge_parts import WeightedAdapter
from loratool.ops.replay import Record, RecordedInput
from loratool.ops.weights import Weight, names_of, rules_from, weigh
from loratool.plan import Plan, ReplacePart, Step
from loratool.store.checkpoint import Checkpoint
from loratool.store.provenance import adapter_id
from loratool.store.source import AdapterArgument

_WAY_OUT = "the base settles it: --base BASE; or subtract --undo FILE (from merge --save-undo)"


def require_reversible(adapters: Sequence[WeightedAdapter]) -> tuple[WeightedAdapter, ...]:
    """Adapters whose whole change can be subtracted.

    Raises:
        MismatchError: a change depends on the base, or replaced what the base had.
    """
    for one in adapters:
        _require_sums(one)
        _refuse_replacements(one)
    return tuple(adapters)


def require_swappable(adapters: Sequence[WeightedAdapter]) -> tuple[WeightedAdapter, ...]:
    """(old, new): what old replaced must be replaced by new, whole; old's part then falls away.

    Raises:
        MismatchError: a change depends on the base, or a tensor would stay the old adapter's, or
            new replaces rows, or parts, of what old changed.
    """
    old, new = without_overwritten(adapters)
    _require_sums(old)
    _require_sums(new)
    _refuse_replacements(old)
    _refuse_replacements(new, {b.target for b in old.bindings.deltas})
    return old, new


def _refuse_replacements(one: WeightedAdapter, among: Collection[str] | None = None) -> None:
    """Refuse those of an adapter, or those of some targets: where the other's change still is."""
    targets = [b.target for b in one.bindings.replacements]
    if lost := [t for t in targets if among is None or t in among]:
        raise MismatchError(
            "LT-456", "what a replacement tensor replaced is not in the merged weights",
            file=one.adapter.path, key=list_some(lost), hint=_WAY_OUT,
        )  # fmt: skip


def without_overwritten(adapters: Sequence[WeightedAdapter]) -> tuple[WeightedAdapter, ...]:
    """(old, new): what old did to tensors that new replaces, whole, is gone with them."""
    old, new = adapters
    whole = {b.target for b in new.bindings.replacements
             if b.replacement.rows is None and new.weight.of(b.replacement.name) == 1}  # fmt: skip
    bindings = replace(
        old.bindings,
        deltas=tuple(b for b in old.bindings.deltas if b.target not in whole),
        replacements=tuple(b for b in old.bindings.replacements if b.target not in whole),
    )
    return replace(old, bindings=bindings), new


def depends_on_base(step: Step) -> bool:
    """True if a change in a step is no sum of its own: a replacement, DoRA, PiSSA."""
    return any(isinstance(p, ReplacePart) or not p.spec.is_additive for p in step.parts)


def anchored(plan: Plan, names: Mapping[int, str], base: Checkpoint) -> Plan:
    """The plan with the base's tensors beside the merged ones, where changes refer to them.

    Args:
        plan: of taking out of, or putting into, merged weights.
        names: step index -> checkpoint-wide name.
        base: what the adapters were trained on.

    Raises:
        MismatchError: LT-455, the base lacks such a tensor, or has it in another shape.
    """
    steps = list(plan.steps)
    for index, step in enumerate(steps):
        if not depends_on_base(step):
            continue
        ref, merged = base.tensors.get(names[index]), step.inputs[0]
        if ref is None or ref.shape != merged.shape:
            raise MismatchError(
                "LT-455", "this change depends on the base, which has no such tensor",
                file=base.path, key=names[index], expected=list(merged.shape),
                got="nothing" if ref is None else list(ref.shape),
            )  # fmt: skip
        steps[index] = replace(
            step, inputs=(*step.inputs, ref), args={**step.args, "anchor": len(step.inputs)}
        )
    return replace(plan, steps=tuple(steps))


def may_keep_columns(adapters: Iterable[WeightedAdapter]) -> list[str]:
    """Weights to which adapters may have given columns that none needs: they are taken out."""
    found: dict[str, bool] = {}
    for one in adapters:
        for delta in one.bindings.deltas:
            if may_have_grown(delta.spec, delta.target):
                is_out = one.weight.of(delta.spec.name) < 0
                found[delta.target] = is_out and found.get(delta.target, True)
    return [name for name, is_out in found.items() if is_out]


def column_notes(
    targets: Iterable[str], merged: Checkpoint, base: Checkpoint | None
) -> tuple[str, ...]:
    """What stays of the columns that an adapter brought: taking it out leaves them, near zero.

    Args:
        targets: of `may_keep_columns`.
        merged: the merged weights.
        base: what the adapters were trained on, None if it was not given.
    """
    notes = []
    for name in targets:
        count = merged.tensors[name].shape[1]
        if base is None:
            notes.append(f"{name} keeps its {count} columns, also those that the merge may have "
                         "added: --base BASE tells, --undo FILE takes them out")  # fmt: skip
        elif (ref := base.tensors.get(name)) is not None and ref.shape[1] < count:
            notes.append(f"{name} keeps {count} columns, {count - ref.shape[1]} more than the "
                         "base: zeros up to rounding; --undo FILE takes them out")  # fmt: skip
    return tuple(notes)


def without_replacements(adapters: Sequence[WeightedAdapter]) -> tuple[WeightedAdapter, ...]:
    """The same adapters, their replacement tensors left out."""
    none: dict[str, Any] = {"replacements": (), "grown": {}, "created": {}}
    return tuple(replace(a, bindings=replace(a.bindings, **none)) for a in adapters)


def _require_sums(one: WeightedAdapter) -> None:
    other = [f"{b.spec.name} ({b.spec.title})"
             for b in one.bindings.deltas if not b.spec.is_additive]  # fmt: skip
    if other:
        raise MismatchError(
            "LT-455", "this change depends on the base, which the merged weights no longer show",
            file=one.adapter.path, key=list_some(other), hint=_WAY_OUT,
        )  # fmt: skip


def require_unscaled(record: Record | None, adapters: Iterable[WeightedAdapter]) -> None:
    """Refuse to subtract from a sum that a merge multiplied afterwards (an untied T5 head).

    Raises:
        MismatchError: an adapter changes such a tensor.
    """
    scaled = record.options.get("scaled", ()) if record is not None else ()
    for one in adapters:
        lost = [b.target for b in one.bindings.deltas if b.target in scaled]
        if lost:
            raise MismatchError(
                "LT-422", "the merge multiplied this sum: the change is not in it as it was",
                file=one.adapter.path, key=list_some(lost), hint=_WAY_OUT,
            )  # fmt: skip


def compare_with_record(
    record: Record | None, adapters: Iterable[tuple[Adapter, Weight]]
) -> tuple[list[str], list[str]]:
    """What the merged weights' provenance says about taking adapters out.

    Args:
        record: provenance, None if there is none that can be used.
        adapters: taken out, with the weights at which they were put in.

    Returns:
        Warnings and notes.
    """
    if record is None or record.operation != "merge":
        return [], ["the merged weights do not say what was merged into them"]
    rows = record.inputs
    base = next((k for k, row in rows.items() if row.role == "base"), None)
    order = [k for k, row in rows.items() if not row.role]
    warnings, listed = [], set()
    for adapter, weight in adapters:
        mine = {v for k, v in adapter_id(adapter).items() if k.endswith(".safetensors")}
        label = next((k for k in order if mine & _files(rows[k])), None)
        if label is None:
            warnings.append(f"{adapter.label} is not among what was merged: {list_some(rows)}")
            continue
        listed.add(label)
        merged = _recorded(record, rows[label], adapter, order.index(label))
        if merged is None or merged.value != weight.value:
            got = merged or rows[label].weight
            warnings.append(f"{label} was merged at weight {got}, not {weight}")
        elif any(merged.of(name) != weight.of(name) for name in names_of(adapter)):
            warnings.append(f"{label} was merged with other weights per component or module")
    notes = [
        f"{k} was put in too, and stays in" for k, row in rows.items() if row.role == "residual"
    ]
    if base is not None and not warnings:
        others = [k for k in order if k not in listed]
        way = f"merging {list_some(others)} into {base}" if others else f"the base, {base},"
        notes.append(f"{way} has every bit; this leaves the rounding of the merge in")
    return warnings, notes


def _recorded(record: Record, row: RecordedInput, adapter: Adapter, position: int) -> Weight | None:
    """The coefficients at which an adapter was merged; None if the record is damaged."""

    def refuse(why: str) -> NoReturn:
        raise MismatchError("LT-458", "the provenance of this checkpoint is damaged", got=why)

    if row.weight is None:
        return None
    try:
        rules = rules_from(record.options.get("module_weights", ()), refuse)
        if any(len(weights) <= position for _, weights in rules):
            return None
        typed = AdapterArgument("", row.weight, row.components, row.blocks)
        return weigh(adapter, typed, rules, position)
    except LoratoolError:
        return None


def _files(row: RecordedInput) -> set[str]:
    return {v for v in row.files.values() if isinstance(v, str)}
