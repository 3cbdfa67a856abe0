"""Plan the extraction of an adapter from a full fine-tune."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from loratool.adapter import TensorRef
from loratool.archs.layers import experts_lie_turned, is_conv1d
from loratool.archs.names import to_memory
from loratool.archs.stated import model_type
from loratool.bind.user_names import part_regex
from loratool.dialects.rules import gains
from loratool.engine.rows import args_of, op_of
from loratool.errors import MismatchError
from loratool.frozen import Frozen, field, replace
from loratool.ops.extract_pairs import (
    Pair,
    join_experts,
    settle_holders,
)
from loratool.ops.pairing import pair_tensors
from loratool.ops.rank_options import Ranks
from loratool.patterns import find, typed_pattern
from loratool.plan import Plan, Step, TensorSpec
from loratool.store.checkpoint import Checkpoint

KEEP_WORDS = ("embeddings", "all", "none")
"""Values of ``--keep`` that are no regular expressions."""


class ExtractPlan(Frozen):
    """A plan, the pairs behind its steps, and names.

    Attributes:
        plan: one step per pair that both checkpoints have.
        pairs: step index -> pair.
        created: tensors that only TUNED has.
        memory_names: on-disk name -> name that the adapter uses.
        places: on-disk name -> all names that the adapter uses, where there are several: the
            modules of a tied tensor.
        absent: heads of the base that TUNED lacks.
        kept: names of tensors that a regular expression of ``--keep`` finds.
        notes: one sentence each.
    """

    plan: Plan
    pairs: tuple[Pair, ...]
    created: tuple[Pair, ...]
    memory_names: Mapping[str, str]
    places: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    absent: tuple[str, ...] = ()
    kept: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()

    def names_of(self, pair: Pair) -> tuple[str, ...]:
        """Every name under which the adapter holds a tensor."""
        return self.places.get(pair.name) or (self.memory_names[pair.name],)


class FactorOptions(Frozen):
    """How ranks are chosen, as plain data.

    Attributes:
        ranks: criteria, module by module.
        exact: no iterative factorisation.
        slices: ranks are cut afterwards (``--size``): keep the error at every rank.
    """

    ranks: Ranks = Ranks()
    exact: bool = False
    slices: bool = False

    def of(self, pairs: Sequence[Pair]) -> Iterator[dict[str, Any]]:
        """Arguments of the step of each pair that is factored; what is off is left out."""
        flags = {"auto": self.ranks.auto, "exact": self.exact, "slices": self.slices}
        kernels = [p.tuned.shape[2:] if p.role == "conv" else () for p in pairs]
        for rule in self.ranks.of([p.name for p in pairs], kernels):
            yield {"rule": rule, **{k: True for k, on in flags.items() if on}}


def plan_extract(
    tuned: Checkpoint,
    base: Checkpoint,
    *,
    how: FactorOptions,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    keep: Sequence[str] = (),
    names: str = "v5",
) -> ExtractPlan:
    """Plan tuned - base, tensor by tensor.

    Args:
        tuned: the fine-tuned checkpoint.
        base: what it was tuned from.
        how: how ranks are chosen.
        include: regular expressions; only modules that match are factored, embeddings too.
        exclude: modules that are not factored.
        keep: as in `assemble`; tensors kept by a regular expression are not factored.
        names: ``v5`` (in-memory names of transformers 5) or ``v4`` (on-disk names).

    Raises:
        MismatchError: tensors are missing, or shapes differ.
    """
    paired = pair_tensors(tuned, base, names)
    whole = [k for k in keep if k not in KEEP_WORDS]
    kept = _found(whole, "--keep", [p.name for p in (*paired.matched, *paired.created)])
    factored = _choose(paired.matched, include, exclude, kept)
    chosen = [replace(pair, is_factored=pair in factored) for pair in paired.matched]
    pairs = settle_holders(join_experts(chosen, base, names), base.config)
    known = gains({p.name for p in pairs if p.is_factored})
    args = how.of([p for p in pairs if p.is_factored])
    steps = [
        _factor_step(p, base, next(args), known.get(p.name, 1.0)) if p.is_factored
        else _difference_step(p) for p in pairs
    ]  # fmt: skip
    written = (*pairs, *paired.created)
    kind = model_type(base.config)
    places = {
        p.name: tuple(to_memory(kind, n, names) for n in paired.places[p.name])
        for p in written if p.name in paired.places
    }  # fmt: skip
    memory = {p.name: places.get(p.name, (to_memory(kind, p.name, names),))[0] for p in written}
    plan = Plan("extract", tuple(steps))
    return ExtractPlan(
        plan, tuple(pairs), paired.created, memory, places, paired.absent, kept, paired.notes
    )


def _choose(
    pairs: Sequence[Pair], include: Sequence[str], exclude: Sequence[str], kept: frozenset[str]
) -> set[Pair]:
    names = [pair.name for pair in pairs]
    able = {"linear", "conv", "experts", "in_proj"}
    if include:
        able |= {"embedding", "head"}
    wanted = _found(include, "--include", names) if include else frozenset(names)
    wanted -= _found(exclude, "--exclude", names) | kept
    return {pair for pair in pairs if pair.role in able and pair.name in wanted}


def _found(texts: Sequence[str], option: str, names: Sequence[str]) -> frozenset[str]:
    """The names in which any of the expressions is found."""
    patterns = [typed_pattern(part_regex(text), option) for text in texts]
    return frozenset().union(*find(patterns, names))


def _difference_step(pair: Pair) -> Step:
    assert pair.base is not None
    shape = pair.tuned.shape
    inputs, label = (pair.tuned, pair.base), TensorSpec(pair.name, "F32", shape)
    if not {pair.tuned.dtype, pair.base.dtype} <= _COMPARABLE:
        _refuse_other_type(pair.tuned, pair.base)
        return Step("compare_bytes", label, inputs, (1, pair.tuned.nbytes))
    flat = (1, pair.tuned.numel)
    return Step("difference", label, inputs, flat if len(shape) < 2 else _flat(shape))


def _factor_step(pair: Pair, base: Checkpoint, how: Mapping[str, Any], gain: float) -> Step:
    assert pair.base is not None
    shape = pair.tuned.shape
    inputs: tuple[TensorRef, ...] = (pair.tuned, pair.base)
    label = TensorSpec(pair.name, "F32", shape)
    args: dict[str, Any] = {**how, "transposed": False}
    view = _flat(shape)
    if pair.parts:
        inputs = tuple(ref for part in pair.parts for ref in (part.tuned, part.base) if ref)
        args |= {"experts": shape[0], "names": [part.name for part in pair.parts]}
        view = _flat(pair.parts[0].tuned.shape)
    elif pair.role == "conv":
        view = (shape[0], pair.tuned.numel // shape[0])
        args["kernel"] = list(shape[2:])
    elif pair.role == "experts":
        args["experts"] = shape[0]
        args["transposed"] = experts_lie_turned(base.config, pair.name, shape)
    elif pair.holder == "embedding" or (
        pair.holder == "linear" and is_conv1d(model_type(base.config), pair.module)
    ):
        args["transposed"] = True
    if gain != 1:
        args["gain"] = 1 / gain
    return Step("subtract_and_factor", label, inputs, view, args=args)


_COMPARABLE = frozenset({
    "F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL",
})  # fmt: skip


def _refuse_other_type(tuned: TensorRef, base: TensorRef) -> None:
    if tuned.dtype != base.dtype:
        raise MismatchError(
            "LT-482", "tensors have types that cannot be subtracted", file=tuned.file,
            key=tuned.name, expected=f"{base.dtype}, as in the base", got=tuned.dtype,
        )  # fmt: skip


def _flat(shape: tuple[int, ...]) -> tuple[int, int]:
    rows = 1
    for size in shape[:-1]:
        rows *= size
    return (rows, shape[-1])


_MOST_TOGETHER = 8
"""Matrices in a batch: enough to make up for launches, few enough to begin and end soon."""


def group_steps(plan: Plan, max_bytes: int) -> tuple[Plan, list[list[int]]]:
    """Put small factoring steps of one shape together: a GPU does a batch in the time of one.

    How many matrices a batch has room for depends on their shape alone.

    Args:
        plan: one pair per step.
        max_bytes: largest batch, as float32 differences.

    Returns:
        (plan, positions of the original steps that each step stands for).
    """
    groups: list[list[int]] = []
    open_: dict[tuple[Any, ...], list[int]] = {}
    for index, step in enumerate(plan.steps):
        key = (step.op, step.view, repr(step.args), tuple(i.dtype for i in step.inputs))
        group = open_.get(key)
        slots = _slots(step, max_bytes)
        if slots == 1 or group is None or len(group) == slots:
            groups.append([index])
            if slots > 1:
                open_[key] = groups[-1]
        else:
            group.append(index)
    groups.sort(key=lambda g: g[0])
    joined = (_join([plan.steps[i] for i in g], max_bytes) for g in groups)
    return replace(plan, steps=tuple(joined)), groups


def _slots(step: Step, max_bytes: int) -> int:
    if not op_of(step).is_arithmetic or args_of(step).experts:
        return 1
    size = max(1, 4 * step.view[0] * step.view[1])
    return max(1, min(_MOST_TOGETHER, max_bytes // size))


def _join(steps: Sequence[Step], max_bytes: int) -> Step:
    slots = _slots(steps[0], max_bytes)
    if slots == 1:
        return steps[0]
    inputs = tuple(i for s in steps for i in s.inputs)
    args = {**steps[0].args, "names": [s.output.name for s in steps], "slots": slots}
    return replace(steps[0], inputs=inputs, args=args)
