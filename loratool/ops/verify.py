"""Plan the comparison of a merged checkpoint with what merging would write."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from loratool.archs.ties import Tie, find_ties
from loratool.dtypes import DTYPES
from loratool.engine.rows import op_of
from loratool.errors import MismatchError
from loratool.frozen import Frozen, replace
from loratool.ops.align import align_names, same_form
from loratool.ops.coded import plain_dtype
from loratool.plan import Plan, Step, TensorSpec
from loratool.store.checkpoint import Checkpoint


class VerifyPlan(Frozen):
    """Steps that compare, and the tensors that only one side has.

    Attributes:
        plan: one compare step per tensor that both sides have.
        names: of these tensors, checkpoint-wide: two text encoders have the same ones in files.
        missing: tensors that merging would write and MERGED lacks.
        unexpected: tensors of MERGED that merging would not write.
        unlike: (tensor, reason) for tensors of another shape or type.
    """

    plan: Plan
    names: tuple[str, ...]
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
    pairs = [(plain_dtype(ref), merged.tensors[n].dtype)
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

    A tied tensor may be stored once or several times, whatever merging would do.

    Args:
        plan: what merging would do.
        names: position of a step -> checkpoint-wide name of its tensor.
        merged: the checkpoint under test.
    """
    if any(op_of(step).writes_codes for step in plan.steps):
        raise MismatchError(
            "LT-424", "a merge into quantised weights is not verified number by number",
            file=merged.path,
            hint="merge again: the same inputs and options give the same bytes",
        )  # fmt: skip
    steps: dict[str, Step] = {}
    missing: list[str] = []
    unlike: list[tuple[str, str]] = []
    ties = find_ties(merged)
    tied = {name: merged.tensors[t.stored[0]] for t in ties for name in t.missing}
    for index, step in enumerate(plan.steps):
        name = names[index]
        found = merged.tensors.get(name) or tied.get(name)
        if found is None:
            missing.append(name)
        elif found.shape != step.output.shape:
            unlike.append((name, f"shape {list(found.shape)}, expected {list(step.output.shape)}"))
        elif found.dtype != step.output.dtype:
            unlike.append((name, f"type {found.dtype}, expected {step.output.dtype}"))
        elif op_of(step).is_proven:
            inputs = (*step.inputs, found)
            steps[name] = replace(step, op="compare_completed", inputs=inputs, shard=-1)
        elif op_of(step).moves_bytes:
            both = step.inputs[0], found
            steps[name] = Step("compare_bytes", step.output, both, (1, found.nbytes))
        else:
            steps[name] = replace(step, op="compare", inputs=(*step.inputs, found), shard=-1)
    unexpected = set(merged.tensors) - set(names.values())
    copies = _copies(ties, unexpected, merged)
    unexpected -= copies.keys()
    steps |= copies
    verify = Plan("verify", tuple(steps.values()))
    return VerifyPlan(
        verify, tuple(steps), tuple(sorted(missing)), tuple(sorted(unexpected)), tuple(unlike)
    )


def _copies(
    ties: Iterable[Tie], unexpected: Collection[str], merged: Checkpoint
) -> dict[str, Step]:
    """Further stored names of a tie, each compared with the one that merging would write."""
    found: dict[str, Step] = {}
    for tie in ties:
        first = next((merged.tensors[n] for n in tie.stored if n not in unexpected), None)
        for name in (n for n in tie.stored if n in unexpected):
            copy = merged.tensors[name]
            if first is not None and (first.dtype, first.shape) == (copy.dtype, copy.shape):
                output = TensorSpec(name, copy.dtype, copy.shape)
                found[name] = Step("compare_bytes", output, (first, copy), (1, copy.nbytes))
    return found
