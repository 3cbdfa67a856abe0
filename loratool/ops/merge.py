"""Plan a merge of adapters into base weights: one step per output tensor."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from loratool.adapter import Adapter, CodedRef, DeltaSpec, Replacement, Source, TensorRef
from loratool.archs.stated import dtype_config
from loratool.bind.bindings import Bindings, BoundReplacement
from loratool.bind.columns import COLUMNS
from loratool.delta.forms import shape_of
from loratool.dtypes import DTYPES, numel
from loratool.engine.rows import args_of, op_of
from loratool.errors import MismatchError, list_some
from loratool.ops.align_parts import require_aligned
from loratool.ops.coded import plain_dtype, require_codable
from loratool.ops.weights import Weight
from loratool.plan import DeltaPart, Part, Plan, ReplacePart, ShardPlan, Step, TensorSpec
from loratool.quant import codec_of
from loratool.store.checkpoint import Checkpoint, Shard

_SHARD_NUMBER = re.compile(r"-\d{5}-of-\d{5}(?=\.safetensors$)")


@dataclass(frozen=True)
class WeightedAdapter:
    """An adapter as it takes part in a merge.

    Attributes:
        adapter: the adapter.
        weight: the user's coefficients.
        bindings: its targets in the base.
    """

    adapter: Adapter
    weight: Weight
    bindings: Bindings


@dataclass(frozen=True)
class MergePlan:
    """A plan and what the report says about it.

    Attributes:
        plan: the steps.
        changed: output tensors that deltas or replacements change.
        copied: output tensors copied byte for byte.
        cast: output tensors that only change their type.
        config_changes: dotted key of config.json -> value.
        notes: one sentence each.
    """

    plan: Plan
    changed: tuple[str, ...]
    copied: tuple[str, ...]
    cast: tuple[str, ...]
    config_changes: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


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
    if how.get("rounding") == "exact":
        _require_sums(adapters)
    if "method" in how:
        _require_additive(adapters, str(how["method"]))
    new_tensors, config_changes = _agreed(adapters)
    scales = {name: f for one in adapters for name, f in one.bindings.scales.items()}
    grown = _grown(adapters)
    _check_columns(adapters)
    parts = _collect_parts(adapters, new_tensors, keep_all="method" in how)
    if "method" in how:
        for name, found in parts.items():
            require_aligned(name, [p for p in found if isinstance(p, DeltaPart)], how["method"])
    steps: dict[str, Step] = {}
    sources = {**checkpoint.tensors, **{n: checkpoint.tensors[s] for n, s in new_tensors.items()}}
    sources |= {name: sources[name].grown(rows) for name, rows in grown.items()}
    for name, ref in sources.items():
        label = name if name in new_tensors else _file_name(name, ref, checkpoint)
        found = parts.pop(name, [])
        if name in scales:
            steps[name] = _make_scaled(label, ref, found, dtype, {**how, "scale": scales[name]})
        else:
            steps[name] = _make_step(label, ref, found, dtype, how)
    if parts:
        raise AssertionError(f"parts without a tensor: {sorted(parts)}")
    steps |= _make_scales(steps, sources)
    if dtype is not None:
        config_changes |= dtype_config(checkpoint.config, dtype)
    groups = _group(steps, checkpoint, shard_bytes)
    shards = tuple(
        _make_shard(shard, name, [steps[t] for t in names], file_metadata)
        for shard, name, names in groups
    )
    ordered = tuple(
        Step(s.op, s.output, s.inputs, s.view, s.parts, index, s.args)
        for index, (_, _, names) in enumerate(groups)
        for s in (steps[t] for t in names)
    )
    notes = tuple(n for a in adapters for n in (*a.adapter.notes, *a.bindings.notes))
    plan = Plan("merge", ordered, shards)
    by_op = {
        op: tuple(t for t, s in steps.items() if _fate(s, checkpoint.tensors.get(t)) == op)
        for op in ("changed", "copied", "cast")
    }
    return MergePlan(
        plan,
        by_op["changed"],
        by_op["copied"],
        by_op["cast"],
        config_changes,
        tuple(dict.fromkeys(notes)),
    )


def _agreed(adapters: Sequence[WeightedAdapter]) -> tuple[dict[str, str], dict[str, Any]]:
    new: dict[str, str] = {}
    config: dict[str, Any] = {}
    for one in adapters:
        for key, value in one.bindings.config_changes.items():
            if config.get(key, value) != value:
                raise MismatchError(
                    "LT-470",
                    "adapters want different values in config.json",
                    file=one.adapter.path,
                    key=key,
                    expected=config[key],
                    got=value,
                    hint="merge them one after the other",
                )
            config[key] = value
        new.update(one.bindings.new_tensors)
    return new, config


def _grown(adapters: Sequence[WeightedAdapter]) -> dict[str, int]:
    """Tables with rows for tokens that the base lacks -> rows in all."""
    found: dict[str, int] = {}
    for one in adapters:
        for name, rows in one.bindings.grown.items():
            if name in found:
                raise MismatchError(
                    "LT-428", "two adapters bring what the base lacks", file=one.adapter.path,
                    key=name, got="rows for new tokens", hint="merge them one after the other",
                )  # fmt: skip
            _check_put_in(one, name)
            found[name] = rows
    return found


def _check_put_in(one: WeightedAdapter, name: str) -> None:
    """Refuse to take out what the base lacks."""
    if one.weight.value <= 0:
        raise MismatchError(
            "LT-429", "what is to be taken out is not in the base", file=one.adapter.path,
            key=name, got=f"weight {one.weight}", hint="leave the adapter out",
        )  # fmt: skip


def _check_columns(adapters: Sequence[WeightedAdapter]) -> None:
    """Refuse changes that do not fit a weight to which an adapter gives more columns."""
    wider: dict[str, tuple[int, ...]] = {}
    for one in adapters:
        for b in one.bindings.replacements:
            if b.replacement.origin == COLUMNS:
                _check_put_in(one, b.target)
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
    if other := _named(adapters, lambda s: not s.is_additive):
        raise MismatchError(
            "LT-418", f"{method} works on changes that do not depend on the base",
            key=list_some(other, 3), hint="leave --method out: their sum is defined",
        )  # fmt: skip


def _require_sums(adapters: Sequence[WeightedAdapter]) -> None:
    """DoRA has a square root in it, PiSSA a decomposition, a Tucker core inner sums."""
    scaled = [f"{name} (scaled)" for one in adapters for name in one.bindings.scales]
    if other := [*_named(adapters, lambda s: not s.is_sum), *scaled]:
        raise MismatchError(
            "LT-477", "exact rounding is for sums of products, and this change is none",
            key=list_some(other), hint="leave --exact out",
        )  # fmt: skip


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


def _file_name(name: str, ref: TensorRef, checkpoint: Checkpoint) -> str:
    if not checkpoint.components:
        return name
    prefix = next(s.prefix for s in checkpoint.shards if s.path == ref.path)
    return name.removeprefix(prefix)


_Group = tuple[Shard, str, list[str]]


def _group(
    steps: Mapping[str, Step], checkpoint: Checkpoint, shard_bytes: int | None
) -> list[_Group]:
    """Output files: (input shard they stem from, name, checkpoint-wide tensor names)."""
    home: dict[Path, list[str]] = {s.path: [] for s in checkpoint.shards}
    last = checkpoint.shards[-1].path
    for name in steps:
        ref = checkpoint.tensors.get(name)
        home[ref.path if ref is not None and ref.path in home else last].append(name)
    if shard_bytes is None:
        return [(s, s.name, home[s.path]) for s in checkpoint.shards]
    if checkpoint.components:
        raise MismatchError(
            "LT-472", "--shard-size does not apply to a pipeline", file=checkpoint.path,
            hint="merge one component folder at a time",
        )  # fmt: skip
    runs: list[list[str]] = []
    size = 0
    for name in (n for names in home.values() for n in names):
        nbytes = steps[name].output.nbytes
        if not runs or size + nbytes > shard_bytes:
            runs.append([])
            size = 0
        runs[-1].append(name)
        size += nbytes
    stem = _stem(checkpoint)
    first = checkpoint.shards[0]
    if len(runs) == 1:
        return [(first, f"{stem}.safetensors", runs[0])]
    return [
        (first, f"{stem}-{i:05d}-of-{len(runs):05d}.safetensors", names)
        for i, names in enumerate(runs, 1)
    ]


def _stem(checkpoint: Checkpoint) -> str:
    return _SHARD_NUMBER.sub("", checkpoint.shards[0].name).removesuffix(".safetensors")


def index_files(plan: Plan, checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """Index files (path -> object) of a sharded output, with the true ``total_size``."""
    if not checkpoint.is_folder:
        return {}
    folders: dict[str, list[ShardPlan]] = {}
    for shard in plan.shards:
        folders.setdefault(str(PurePosixPath(shard.name).parent), []).append(shard)
    found: dict[str, dict[str, Any]] = {}
    for folder, shards in folders.items():
        if len(shards) == 1 and not (checkpoint.index_name and not checkpoint.components):
            continue
        stem = _SHARD_NUMBER.sub("", PurePosixPath(shards[0].name).name)
        name = f"{stem.removesuffix('.safetensors')}.safetensors.index.json"
        weight_map = {t.name: PurePosixPath(s.name).name for s in shards for t in s.tensors}
        size = sum(t.nbytes for s in shards for t in s.tensors)
        found[name if folder == "." else f"{folder}/{name}"] = {
            "metadata": {"total_size": size},
            "weight_map": dict(sorted(weight_map.items())),
        }
    return found


def _make_shard(
    shard: Shard, name: str, steps: list[Step], file_metadata: Mapping[str, str] | None
) -> ShardPlan:
    tensors = tuple(s.output for s in steps)
    kept = {k: v for k, v in shard.metadata.items() if k != "loratool"}  # it speaks of the input
    metadata = {**kept, **(file_metadata or {})}
    own = [s.inputs[0] for s in steps if isinstance(s.inputs[0], TensorRef)]
    is_same = (
        not file_metadata
        and name == shard.name
        and len(own) == len(steps) == len(shard.keys)
        and all(
            type(ref) is TensorRef
            and ref.path == shard.path
            and (ref.name, ref.dtype, ref.shape) == (t.name, t.dtype, t.shape)
            for ref, t in zip(own, tensors, strict=True)
        )
    )
    if is_same and all(op_of(s).moves_bytes for s in steps):
        return ShardPlan(name, tensors, metadata, shard.header, shard.path)
    return ShardPlan(name, tensors, metadata)
