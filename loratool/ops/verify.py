"""Plan the comparison of a merged checkpoint with what merging would write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from loratool.dtypes import DTYPES
from loratool.errors import MismatchError
from loratool.ops.align import align_names, same_form
from loratool.plan import Plan, Step
from loratool.store.checkpoint import Checkpoint


@dataclass(frozen=True)
class VerifyPlan:
    """Steps that compare, and the tensors that only one side has.

    Attributes:
        plan: one compare step per tensor that both sides have.
        missing: tensors that merging would write and MERGED lacks.
        unexpected: tensors of MERGED that merging would not write.
        unlike: (tensor, reason) for tensors of another shape or type.
    """

    plan: Plan
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    unlike: tuple[tuple[str, str], ...]


def under_names_of(merged: Checkpoint, base: Checkpoint) -> Checkpoint:
    """A merged checkpoint with the names that its base has, and in its form where slices do."""
    form, base_form, _ = same_form(merged, base)
    if base_form.tensors.keys() != base.tensors.keys():
        form = merged  # the base holds together what MERGED holds apart
    return replace(form, tensors=align_names(form, base))


def merged_dtype(base: Checkpoint, merged: Checkpoint) -> str | None:
    """The type that MERGED was cast to, None if it kept the base's types.

    Types that no merge casts from or to do not count: `plan_verify` names such tensors.

    Raises:
        MismatchError: its tensors changed to several types.
    """
    merged = under_names_of(merged, base)
    pairs = [(ref.dtype, merged.tensors[n].dtype)
             for n, ref in base.tensors.items() if n in merged.tensors]  # fmt: skip
    changed = {
        after
        for before, after in pairs
        if before != after and DTYPES[before].is_mergeable and DTYPES[after].is_mergeable
    }
    if len(changed) > 1:
        raise MismatchError(
            "LT-475",
            "tensors of the merged checkpoint changed to different types",
            file=merged.path,
            got=", ".join(sorted(changed)),
        )
    return next(iter(changed), None)


def plan_verify(plan: Plan, names: Mapping[int, str], merged: Checkpoint) -> VerifyPlan:
    """Turn a merge plan into one that reads MERGED and compares.

    Args:
        plan: what merging would do.
        names: position of a step -> checkpoint-wide name of its tensor.
        merged: the checkpoint under test.
    """
    steps: list[Step] = []
    missing: list[str] = []
    unlike: list[tuple[str, str]] = []
    for index, step in enumerate(plan.steps):
        name = names[index]
        found = merged.tensors.get(name)
        if found is None:
            missing.append(name)
        elif found.shape != step.output.shape:
            unlike.append((name, f"shape {list(found.shape)}, expected {list(step.output.shape)}"))
        elif found.dtype != step.output.dtype:
            unlike.append((name, f"type {found.dtype}, expected {step.output.dtype}"))
        elif step.op == "copy":
            steps.append(
                Step("compare_bytes", step.output, (step.inputs[0], found), (1, found.nbytes))
            )
        else:
            steps.append(replace(step, op="compare", inputs=(*step.inputs, found), shard=-1))
    unexpected = sorted(set(merged.tensors) - set(names.values()))
    verify = Plan("verify", tuple(steps))
    return VerifyPlan(verify, tuple(sorted(missing)), tuple(unexpected), tuple(unlike))
