"""Plan a merge of adapters into base weights: one step per output tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loratool.adapter import CodedRef, Source, TensorRef
from loratool.archs.stated import dtype_config
from loratool.dtypes import DTYPES, numel
from loratool.engine.rows import args_of, op_of
from loratool.errors import MismatchError
from loratool.frozen import Frozen, field, replace
from loratool.ops.coded import plain_dtype, require_codable
from loratool.ops.merge_parts import Changes, WeightedAdapter, gather_changes
from loratool.ops.shards import file_name_of, in_shards
from loratool.plan import DeltaPart, Part, Plan, ReplacePart, Step, TensorSpec
from loratool.quant import codec_of
from loratool.store.checkpoint import Checkpoint


class MergePlan(Frozen):
    """A plan and what the report says about it.

    Attributes:
        plan: the steps.
        changed: output tensors that deltas or replacements change.
        copied: output tensors copied byte for byte.
        cast: output tensors that only change their type.
        created: output tensors that a residual adds.
        config_changes: dotted key of config.json -> value.
        notes: one sentence each.
    """

    plan: Plan
    changed: tuple[str, ...]
    copied: tuple[str, ...]
    cast: tuple[str, ...]
    config_changes: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    created: tuple[str, ...] = ()


def plan_merge(
    adapters: Sequence[WeightedAdapter],
    checkpoint: Checkpoint,
    *,
    dtype: str | None = None,
    shard_bytes: int | None = None,
    file_metadata: Mapping[str, str] | None = None,
    rounding: Mapping[str, Any] | None = None,
) -> MergePlan:
    """Plan W' = round(W + Σ weight·change) for every tensor of a checkpoint.

    Args:
        adapters: with their bindings to ``checkpoint``.
        checkpoint: the base (the virtual one where layers are replicated).
        dtype: safetensors name that every float tensor is cast to; None keeps each type.
        shard_bytes: largest shard; None keeps the base's shards.
        file_metadata: metadata added to the header of a single-file output.
        rounding: how sums are rounded, as `loratool.engine.rounders` reads it; empty = nearest.
            ``method`` and ``params``: how the changes of one tensor are combined; empty = summed.

    Raises:
        MismatchError: two adapters want different things of one tensor, or exact rounding of a
            change that is no sum of products.
    """
    how = dict(rounding or {})
    given = gather_changes(adapters, how)
    steps = _make_steps(checkpoint, given, dtype, how)
    config_changes = dict(given.config_changes)
    if dtype is not None:
        config_changes |= dtype_config(checkpoint.config, dtype)
    plan = Plan("merge", *in_shards(steps, checkpoint, shard_bytes, file_metadata))
    fates = {name: _fate(step, checkpoint.tensors.get(name)) for name, step in steps.items()}
    changed, copied, cast = (
        tuple(name for name, fate in fates.items() if fate == wanted)
        for wanted in ("changed", "copied", "cast")
    )
    notes = dict.fromkeys(n for a in adapters for n in (*a.adapter.notes, *a.bindings.notes))
    return MergePlan(plan, changed, copied, cast, config_changes, tuple(notes))


def _make_steps(
    checkpoint: Checkpoint, given: Changes, dtype: str | None, how: Mapping[str, Any]
) -> dict[str, Step]:
    """One step per output tensor, by checkpoint-wide names."""
    tensors = checkpoint.tensors
    sources = {**tensors, **{new: tensors[old] for new, old in given.new_tensors.items()}}
    sources |= {name: sources[name].grown(rows) for name, rows in given.grown.items()}
    if lost := given.parts.keys() - sources.keys():
        raise AssertionError(f"parts without a tensor: {sorted(lost)}")
    steps: dict[str, Step] = {}
    for name, ref in sources.items():
        label = name if name in given.new_tensors else file_name_of(name, ref, checkpoint)
        parts = given.parts.get(name, [])
        if name in given.scales:
            args = {**how, "scale": given.scales[name]}
            steps[name] = _make_scaled(label, ref, parts, dtype, args)
        else:
            steps[name] = _make_step(label, ref, parts, dtype, how)
    return steps | _make_scales(steps, sources)


def _make_coded(name: str, ref: CodedRef, parts: list[Part], how: Mapping[str, Any]) -> Step:
    """A weight that stays in codes: as they are, or coded anew."""
    codes = ref.codes
    assert codes is not None
    output = TensorSpec(codes.name, codes.dtype, codes.shape)
    if not parts:
        return Step("copy", output, (codes,), (1, codes.nbytes))
    require_codable(name, ref)
    step = _make_step(name, replace(ref, is_kept=False), parts, None, how)
    view, args = matrix_view(ref.shape, parts), {**how, "coded": ref}
    if codec_of(ref.codec).writes == "blocks":
        return replace(step, op="requantize", output=output, view=view, args=args)
    return replace(
        step, op="requantize_rows", output=output, inputs=(codes, *step.inputs),
        view=(ref.numel // ref.shape[-2], codes.nbytes * ref.shape[-2] // ref.numel),
        args={**args, "view": view},
    )  # fmt: skip


def _make_scales(steps: Mapping[str, Step], sources: Mapping[str, TensorRef]) -> dict[str, Step]:
    """The factors of weights that are coded anew, by their names."""
    names = {ref: name for name, ref in sources.items() if not isinstance(ref, CodedRef)}
    made = {}
    for step in steps.values():
        coded = args_of(step).coded if op_of(step).writes_codes else None
        if coded is None or coded.scales is None:
            continue
        name = names[coded.scales]
        old = steps[name]
        if op_of(step).has_one_input:  # factors lie as rows beside the codes
            made[name] = replace(
                step, op="requantize_row_factors", output=old.output,
                inputs=(coded.scales, *step.inputs[1:]),
                view=(step.view[0], old.output.numel // step.view[0]),
            )  # fmt: skip
            continue
        made[name] = replace(
            step, op="requantize_scales", output=old.output, inputs=(coded.scales, *step.inputs),
            view=matrix_view(old.output.shape, ()), args={**step.args, "view": step.view},
        )  # fmt: skip
    return made


def _make_step(
    name: str, ref: TensorRef, parts: list[Part], dtype: str | None, how: Mapping[str, Any]
) -> Step:
    if isinstance(ref, CodedRef) and ref.is_kept:
        return _make_coded(name, ref, parts, how)
    base: Source = ref
    target = plain_dtype(ref)
    if dtype is not None and DTYPES[ref.dtype].is_mergeable:
        target = dtype
    whole = [p for p in parts if isinstance(p, ReplacePart) and p.rows is None]
    if len(whole) == 1 and whole[0].weight == 1:
        base, parts = whole[0].source, [p for p in parts if p is not whole[0]]
        if ref.zeros and isinstance(base, TensorRef):
            base = base.grown(ref.shape[0])
        whole = []
    output = TensorSpec(name, target, base.shape)
    for replaced in whole:
        if replaced.source.shape != ref.shape:
            raise MismatchError(
                "LT-471",
                "a replacement of another shape can only be taken at weight 1, alone",
                key=name,
                expected=list(ref.shape),
                got=list(replaced.source.shape),
            )
    if parts:
        inputs = (base, *(p.source for p in whole))
        view = matrix_view(base.shape, parts)
        return Step("add_deltas", output, inputs, view, tuple(parts), args=how)
    if base.dtype == target:
        return Step("copy", output, (base,), (1, base.nbytes))
    # A cast alone is never left to chance: only changes have something to lose.
    exact = how if how.get("rounding") == "exact" else {}
    return Step("cast", output, (base,), matrix_view(base.shape, ()), args=exact)


def _make_scaled(
    name: str, ref: TensorRef, parts: list[Part], dtype: str | None, how: Mapping[str, Any]
) -> Step:
    """A sum that is multiplied before it is rounded; it never is a mere copy."""
    step = _make_step(name, ref, parts, dtype, how)
    view = matrix_view(step.output.shape, step.parts)
    return replace(step, op="add_deltas", view=view, args=how)


def matrix_view(shape: tuple[int, ...], parts: Sequence[Part]) -> tuple[int, int]:
    """The (rows, cols) matrix that deltas act on: see `loratool.plan.Region`."""
    if len(shape) < 2:
        return (1, numel(shape))
    if any(isinstance(p, DeltaPart) and p.spec.layout == "conv" for p in parts):
        return (shape[0], numel(shape[1:]))
    return (numel(shape[:-1]), shape[-1])


def _fate(step: Step, ref: TensorRef | None) -> str:
    stored = () if ref is None else (ref, *ref.stored)
    return op_of(step).fate if step.inputs[0] in stored else "changed"
