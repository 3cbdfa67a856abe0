"""Plans around a residual: what TUNED has that a merge lacks, and putting it in again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from loratool.adapter import TensorRef
from loratool.dtypes import DTYPES
from loratool.errors import MismatchError
from loratool.ops.align import align_names
from loratool.ops.bind_types import BindOptions
from loratool.ops.merge import MergePlan
from loratool.plan import Plan, ShardPlan, Step, TensorSpec
from loratool.store.checkpoint import Checkpoint
from loratool.store.residual_file import CONFIG_KEYS, Residual, ResidualTensor

_ELEMENTWISE = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")


@dataclass(frozen=True)
class ResidualPlan:
    """Steps that compare a merge with TUNED.

    Attributes:
        plan: one step per tensor of TUNED.
        tensors: its tensors under the base's names, in the order of the steps.
        whole: those that the merge has no counterpart of: stored as they are.
    """

    plan: Plan
    tensors: Mapping[str, TensorRef]
    whole: frozenset[str]


def plan_residual(merge: Plan, base: Checkpoint, tuned: Checkpoint) -> ResidualPlan:
    """Compare what a merge gives, cast to TUNED's types, with TUNED.

    Args:
        merge: the correctly rounded merge of the adapter into ``base``.
        base: its base.
        tuned: the fine-tune.

    Raises:
        MismatchError: a tensor whose bits cannot be compared.
    """
    aligned = align_names(tuned, base)
    merged = dict(zip(full_names(merge, base), merge.steps, strict=True))
    steps: list[Step] = []
    whole: set[str] = set()
    for name, ref in aligned.items():
        if ref.dtype not in _ELEMENTWISE:
            raise MismatchError(
                "LT-485", "a residual cannot hold tensors of this type", file=tuned.path,
                key=name, expected=", ".join(_ELEMENTWISE), got=ref.dtype,
            )  # fmt: skip
        step = merged.get(name)
        found = None if step is None else _compare(step, name, ref)
        if found is None:
            whole.add(name)
            found = Step("residual_of_copy", _spec(name, ref), (ref, ref), (1, ref.numel))
        steps.append(found)
    return ResidualPlan(Plan("residual", tuple(steps)), aligned, frozenset(whole))


def _spec(name: str, ref: TensorRef) -> TensorSpec:
    return TensorSpec(name, ref.dtype, ref.shape)


def _compare(step: Step, name: str, tuned: TensorRef) -> Step | None:
    """A step that compares, None where the merge is of no use."""
    if step.output.shape != tuned.shape:
        return None
    if step.op == "copy" and step.output.dtype == tuned.dtype:
        view = (1, tuned.numel)
        return Step("residual_of_copy", _spec(name, tuned), (*step.inputs, tuned), view)
    if not all(DTYPES[d].is_mergeable for d in (step.inputs[0].dtype, tuned.dtype)):
        return None
    view = (1, tuned.numel) if step.op == "copy" else step.view
    return replace(
        step, op="residual_of_sum", output=_spec(name, tuned), inputs=(*step.inputs, tuned),
        view=view, shard=-1, args={"rounding": "exact"},
    )  # fmt: skip


def full_names(plan: Plan, checkpoint: Checkpoint) -> list[str]:
    """Checkpoint-wide names of a merge's tensors (steps carry the name inside their file)."""
    prefixes = {s.name: s.prefix for s in checkpoint.shards}
    return [
        prefixes.get(plan.shards[step.shard].name, "") + step.output.name for step in plan.steps
    ]


def config_of(tuned: Checkpoint, base: Checkpoint) -> dict[str, Any]:
    """What TUNED's ``config.json`` says about its weights and the base's does not."""
    return {
        key: tuned.config[key]
        for key in CONFIG_KEYS
        if key in tuned.config and tuned.config[key] != base.config.get(key)
    }


def patch_merge(merge: MergePlan, checkpoint: Checkpoint, residual: Residual) -> MergePlan:
    """Turn a correctly rounded merge into one that gives TUNED, every tensor checked.

    Args:
        merge: the plan.
        checkpoint: its base.
        residual: what the merge lacks.
    """
    names = full_names(merge.plan, checkpoint)
    groups: list[list[Step]] = [[] for _ in merge.plan.shards]
    for name, step in zip(names, merge.plan.steps, strict=True):
        entry = residual.tensors.get(name)
        if entry is not None:
            groups[step.shard].append(_patched(step, entry))
    for name in [n for n in residual.tensors if n not in set(names)]:
        entry = residual.tensors[name]
        assert entry.whole is not None
        spec = TensorSpec(name, entry.dtype, entry.shape)
        step = Step("copy", spec, (entry.whole,), (1, entry.whole.numel), shard=len(groups) - 1)
        groups[-1].append(_patched(step, entry))
    filled = [(shard, g) for shard, g in zip(merge.plan.shards, groups, strict=True) if g]
    shards = tuple(
        ShardPlan(shard.name, tuple(s.output for s in g), shard.metadata) for shard, g in filled
    )
    steps = tuple(replace(s, shard=i) for i, (_, g) in enumerate(filled) for s in g)
    plan = replace(merge.plan, steps=steps, shards=shards)
    return replace(merge, plan=plan, config_changes={**merge.config_changes, **residual.config})


def _patched(step: Step, entry: ResidualTensor) -> Step:
    output = TensorSpec(step.output.name, entry.dtype, entry.shape)
    args: dict[str, Any] = {"digest": entry.digest}
    if entry.patch is not None:
        args |= {"patch": entry.patch, "pages": entry.pages}
    if entry.whole is not None:
        flat = (1, entry.whole.numel)
        return replace(
            step, op="patched_copy", output=output, inputs=(entry.whole,), view=flat, parts=(),
            args=args,
        )  # fmt: skip
    is_copy = step.op == "copy" and step.output.dtype == entry.dtype
    view = (1, output.numel) if step.op == "copy" else step.view
    op = "patched_copy" if is_copy else "patched_sum"
    how = {} if is_copy else {"rounding": "exact"}
    return replace(step, op=op, output=output, view=view, args={**how, **args})


def bind_options(options: BindOptions, needed: Mapping[str, bool]) -> BindOptions:
    """A user's options and those that a residual needs."""
    return replace(
        options,
        resize_embeddings=options.resize_embeddings or needed.get("resize_embeddings", False),
        untie=options.untie or needed.get("untie", False),
        keep_tied=options.keep_tied or needed.get("keep_tied", False),
    )


def check_adapter(residual: Residual, adapter: Mapping[str, str]) -> None:
    """Refuse another adapter than the one of the extraction, before any work.

    The base shows in the digests: it may be sharded otherwise by now.

    Args:
        residual: the file.
        adapter: sha256 by file name.

    Raises:
        MismatchError: its tensors differ.
    """
    want, have = ({v for k, v in i.items() if k.endswith(".safetensors")}
                  for i in (residual.adapter, adapter))  # fmt: skip
    if want != have:
        raise MismatchError(
            "LT-486", "the residual goes with another adapter", file=residual.path,
            expected=", ".join(sorted(v[:12] for v in want)),
            got=", ".join(sorted(v[:12] for v in have)),
        )  # fmt: skip
