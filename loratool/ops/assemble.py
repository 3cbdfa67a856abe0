"""Put the parts of an extracted adapter together: factors, kept tensors, what was left out."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from loratool.adapter import Adapter, DeltaSpec, Replacement, TensorData
from loratool.archs.experts import parse_expert
from loratool.archs.layers import is_conv1d
from loratool.archs.stated import model_type
from loratool.delta.forms import factors_of, new_low_rank, with_factors
from loratool.dialects import DEFAULT
from loratool.dialects.rules import joined_weights
from loratool.dialects.stated import BIAS, WHOLE
from loratool.engine.rows import args_of
from loratool.errors import MismatchError
from loratool.frozen import Frozen, replace
from loratool.ops.extract import ExtractPlan
from loratool.ops.extract_pairs import Pair
from loratool.ops.twins import at_every_place
from loratool.plan import Step
from loratool.store.checkpoint import Checkpoint


class Outcome(Frozen):
    """What became of one pair.

    Attributes:
        pair: the tensors.
        fate: ``factored``, ``kept``, ``left_out``, ``dropped`` (its rank came out as 0) or
            ``identical``.
        delta_square: Σ(tuned - base)².
        residual_square: Σ(Δ - what the adapter reproduces)².
        weight_square: Σ base².
        found: a `DifferenceResult` where the pair was to be factored, and differs.
    """

    pair: Pair
    fate: str
    delta_square: float
    residual_square: float
    weight_square: float
    found: Any = None


def assemble(
    extract: ExtractPlan,
    results: Sequence[Any],
    *,
    keep: Sequence[str],
    base: Checkpoint,
    base_model: str | None,
) -> tuple[Adapter, list[Outcome]]:
    """Make the adapter from the results of the steps.

    Args:
        extract: the plan.
        results: a `DifferenceResult` or `CompareResult` per step.
        keep: ``embeddings``, ``all`` or regular expressions of tensors kept whole.
        base: the base checkpoint.
        base_model: what the adapter names as its base.

    Raises:
        MismatchError: the checkpoints are identical, or nothing is left to write.
    """
    specs: list[DeltaSpec] = []
    outcomes: list[Outcome] = []
    for pair, step, found in zip(extract.pairs, extract.plan.steps, results, strict=True):
        outcome = _outcome(pair, found)
        outcomes.append(outcome)
        if outcome.fate == "factored":
            spec = _make_spec(pair, step, found.factors, extract, base)
            specs.extend(at_every_place(spec, extract.names_of(pair)))
    outcomes.extend(Outcome(p, "left_out", 0.0, 0.0, 0.0) for p in extract.created)
    if all(o.fate == "identical" for o in outcomes):
        raise MismatchError("LT-483", "the fine-tune equals the base: nothing to extract")
    specs = _match_mha_ranks(_complete_mha(specs, extract, base))
    specs = _match_expert_ranks(_complete_experts(specs, extract, base))
    left_out = [o.pair for o in outcomes if o.fate == "left_out"]
    kept = [pair for pair in left_out if _is_kept(pair, keep, extract.kept)]
    if not specs and not kept:
        raise MismatchError(
            "LT-484",
            "no change is left to write",
            got=", ".join(sorted({o.fate.replace("_", " ") for o in outcomes})),
            hint="--rank 1 or a larger --size; --keep all stores what is left out",
        )
    held = {p.name for p in kept}
    outcomes = [
        replace(o, fate="kept", residual_square=0.0)
        if o.fate == "left_out" and o.pair.name in held
        else o
        for o in outcomes
    ]
    adapter = Adapter(
        extract.pairs[0].tuned.path.parent,
        DEFAULT,
        tuple(specs),
        tuple(_replacements(kept, extract)),
        base_model,
    )
    return adapter, outcomes


def outline(extract: ExtractPlan, base: Checkpoint) -> Adapter:
    """The adapter as far as the plan tells: what lies where, in factors of rank 1 without content.

    Those of experts have one element.
    """
    specs = [
        _make_spec(pair, step, _blank(pair), extract, base)
        for pair, step in zip(extract.pairs, extract.plan.steps, strict=True)
        if pair.is_factored
    ]
    return Adapter(base.path, DEFAULT, tuple(specs))


def _blank(pair: Pair) -> tuple[TensorData, TensorData]:
    rows, *columns = (1, 1) if pair.holder == "experts" else pair.tuned.shape
    return (TensorData("", "F32", (1, *columns), b""),
            TensorData("", "F32", (rows, 1, *(1 for _ in columns[1:])), b""))  # fmt: skip


def _outcome(pair: Pair, found: Any) -> Outcome:
    is_equal = found.differing == 0 if hasattr(found, "differing") else found.is_equal
    delta, weight = found.delta_square, getattr(found, "weight_square", 0.0)
    if is_equal:
        return Outcome(pair, "identical", delta, delta, weight)  # a cast at most
    if not pair.is_factored:
        return Outcome(pair, "left_out", delta, delta, weight)
    if found.factors is None:
        return Outcome(pair, "dropped", delta, delta, weight, found)
    return Outcome(pair, "factored", delta, found.residual_squares[-1], weight, found)


def _make_spec(
    pair: Pair,
    step: Step,
    factors: tuple[TensorData, TensorData],
    extract: ExtractPlan,
    base: Checkpoint,
) -> DeltaSpec:
    lora_A, lora_B = factors
    name = extract.memory_names[pair.name]
    module, _, parameter = name.rpartition(".")
    experts = pair.tuned.shape[0] if pair.holder == "experts" else 0
    rank = lora_A.shape[0] // max(1, experts)
    is_bare = pair.holder in ("parameter", "experts")
    layout = "linear" if pair.holder == "parameter" else pair.holder
    return new_low_rank(
        module,
        parameter,
        lora_B,
        lora_A,
        layout=layout,
        rank=rank,
        alpha=float(rank),
        scaling=1.0 / _gain(step),
        transposed=pair.holder == "linear" and is_conv1d(model_type(base.config), pair.module),
        experts=experts,
        is_bare=is_bare,
    )


def _gain(step: Step) -> float:
    """What lora_B was multiplied by; 1 for steps that factor nothing."""
    return float(getattr(args_of(step), "gain", 1.0))


def _complete_mha(
    specs: list[DeltaSpec], extract: ExtractPlan, base: Checkpoint
) -> list[DeltaSpec]:
    """PEFT adapts both projections of an attention module or none: zeros for the missing one."""
    have = {s.name for s in specs}
    joined = joined_weights({p.name for p in extract.pairs if p.is_factored})
    partners = joined | {one: other for other, one in joined.items()}
    out = list(specs)
    for pair, step in zip(extract.pairs, extract.plan.steps, strict=True):
        partner = partners.get(pair.name)
        if partner is None:
            continue
        name = extract.memory_names[pair.name]
        if name not in have and extract.memory_names.get(partner, partner) in have:
            other = next(s for s in specs if s.name == extract.memory_names.get(partner, partner))
            out.append(_make_spec(pair, step, _zeros(pair, other.rank), extract, base))
    return out


def _zeros(pair: Pair, rank: int) -> tuple[TensorData, TensorData]:
    rows, cols = pair.tuned.shape
    return (
        TensorData(f"{pair.name} lora_A", "F32", (rank, cols), bytes(4 * rank * cols)),
        TensorData(f"{pair.name} lora_B", "F32", (rows, rank), bytes(4 * rows * rank)),
    )


def rank_groups(extract: ExtractPlan) -> list[list[int]]:
    """Positions of factored steps, those together that PEFT gives one rank.

    Both projections of a fused attention; all experts that have tensors of their own, with their
    routers (PEFT stacks them under transformers 5, and takes their rank from ``r``).
    """
    groups: dict[str, list[int]] = {}
    routed = routed_weights([p.name for p in extract.pairs if p.is_factored])
    joined = joined_weights({p.name for p in extract.pairs if p.is_factored})
    for index, pair in enumerate(extract.pairs):
        if not pair.is_factored:
            continue
        key = "experts" if pair.name in routed else joined.get(pair.name, pair.name)
        groups.setdefault(key, []).append(index)
    return list(groups.values())


def routed_weights(names: Collection[str]) -> set[str]:
    """Weights of experts that have tensors of their own, and of the routers before them."""
    experts = {n for n in names if (e := parse_expert(n)) is not None and e.expert is not None}
    layers = {found.container.rpartition(".")[0] for n in experts if (found := parse_expert(n))}
    return experts | {n for n in names if n.removesuffix(".gate.weight") in layers}


def _complete_experts(
    specs: list[DeltaSpec], extract: ExtractPlan, base: Checkpoint
) -> list[DeltaSpec]:
    """All experts of a layer or none: zeros for those that did not change."""
    have = {s.name for s in specs}
    layers = {
        found.container
        for pair in extract.pairs
        if extract.memory_names[pair.name] in have
        and (found := parse_expert(pair.name)) is not None
        and found.expert is not None
    }
    out = list(specs)
    for pair, step in zip(extract.pairs, extract.plan.steps, strict=True):
        found = parse_expert(pair.name)
        is_missing = pair.is_factored and extract.memory_names[pair.name] not in have
        if is_missing and found and found.expert is not None and found.container in layers:
            out.append(_make_spec(pair, step, _zeros(pair, 1), extract, base))
    return out


def _match_expert_ranks(specs: list[DeltaSpec]) -> list[DeltaSpec]:
    routed = routed_weights([s.name for s in specs])
    rank = max((s.rank for s in specs if s.name in routed), default=0)
    return [_pad(s, rank) if s.name in routed and s.rank < rank else s for s in specs]


def _match_mha_ranks(specs: list[DeltaSpec]) -> list[DeltaSpec]:
    """PEFT gives both projections of an attention module one rank: zeros fill up the lower one."""
    ranks = {s.name: s.rank for s in specs}
    joined = joined_weights(ranks)
    partners = joined | {one: other for other, one in joined.items()}
    others = (ranks.get(partners.get(s.name, ""), 0) for s in specs)
    return [_pad(s, other) if other > s.rank else s for s, other in zip(specs, others, strict=True)]


def _pad(spec: DeltaSpec, rank: int) -> DeltaSpec:
    lora_B, lora_A = factors_of(spec)
    assert isinstance(lora_A, TensorData) and isinstance(lora_B, TensorData)
    cols, rows, more = lora_A.shape[1], lora_B.shape[0], rank - spec.rank
    old, width = memoryview(lora_B.data).cast("B"), 4 * spec.rank
    padded_A = b"".join((lora_A.data, bytes(4 * more * cols)))
    padded_B = b"".join(
        b for r in range(rows) for b in (old[r * width : (r + 1) * width], bytes(4 * more))
    )
    left = replace(lora_B, shape=(rows, rank), data=padded_B)
    right = replace(lora_A, shape=(rank, cols), data=padded_A)
    return with_factors(spec, left, right, rank=rank, alpha=float(rank))


def _is_kept(pair: Pair, keep: Sequence[str], by_name: frozenset[str]) -> bool:
    is_held = pair.base is not None  # a module that the base lacks takes no tensor
    is_usual = (pair.is_small and is_held) or pair.is_task_head
    return (
        (is_usual and "none" not in keep)
        or "all" in keep
        or ("embeddings" in keep and pair.role in ("embedding", "head"))
        or pair.name in by_name
    )


def _replacements(kept: Sequence[Pair], extract: ExtractPlan) -> list[Replacement]:
    """All of a module whose weight is kept; every bias once one has changed; else the tensor."""
    everything = {p.name: p for p in (*extract.pairs, *extract.created)}
    places = {n for p in kept if not p.is_bias for n in extract.names_of(p)}
    modules = {_module(n) for n in places if n.endswith(".weight")}
    found: dict[str, Replacement] = {}
    done: set[str] = set()
    for name, pair in everything.items():
        for place in extract.names_of(pair):
            if (place in places or _module(place) in modules) and not pair.is_factored:
                found[place] = Replacement(place, pair.tuned, WHOLE)
                done.add(name)
    if any(p.is_bias and p.name not in done for p in kept):
        for name, pair in everything.items():
            if pair.is_bias and name not in done:
                found[name] = Replacement(extract.memory_names[name], pair.tuned, BIAS)
    return list(found.values())


def _module(name: str) -> str:
    return name.rpartition(".")[0]
