"""Put the parts of an extracted adapter together: factors, kept tensors, what was left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loratool import archs
from loratool.adapter import Adapter, DeltaSpec, Replacement, TensorData
from loratool.errors import MismatchError
from loratool.ops.extract import KEEP_WORDS, ExtractPlan, Pair, compile_pattern
from loratool.plan import Step
from loratool.store.checkpoint import Checkpoint


@dataclass(frozen=True)
class Outcome:
    """What became of one pair.

    Attributes:
        pair: the tensors.
        fate: ``factored``, ``kept``, ``left_out`` or ``identical``.
        delta_square: Σ(tuned - base)².
        residual_square: Σ(Δ - what the adapter reproduces)².
        weight_square: Σ base².
        rank: of the factors.
    """

    pair: Pair
    fate: str
    delta_square: float
    residual_square: float
    weight_square: float
    rank: int = 0


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
        MismatchError: the checkpoints are identical.
    """
    specs: list[DeltaSpec] = []
    outcomes: list[Outcome] = []
    changed: list[Pair] = []
    for pair, step, result in zip(extract.pairs, extract.plan.steps, results, strict=True):
        equal = result.differing == 0 if hasattr(result, "differing") else result.is_equal
        delta = result.delta_square
        weight = getattr(result, "weight_square", 0.0)
        if equal:
            outcomes.append(Outcome(pair, "identical", 0.0, 0.0, weight))
        elif pair.is_factored:
            specs.append(_make_spec(pair, step, result.factors, extract, base))
            outcomes.append(
                Outcome(pair, "factored", delta, result.residual_square, weight, specs[-1].rank)
            )
        else:
            changed.append(pair)
            outcomes.append(Outcome(pair, "left_out", delta, delta, weight))
    changed.extend(extract.created)
    outcomes.extend(Outcome(p, "left_out", 0.0, 0.0, 0.0) for p in extract.created)
    if not specs and not changed:
        raise MismatchError("LT-483", "the fine-tune equals the base: nothing to extract")
    specs = _complete_mha(specs, extract, base)
    kept = _keepable(changed, keep)
    replacements = _replacements(kept, extract)
    held = {p.name for p in kept}
    outcomes = [
        Outcome(o.pair, "kept", o.delta_square, 0.0, o.weight_square)
        if o.fate == "left_out" and o.pair.name in held
        else o
        for o in outcomes
    ]
    adapter = Adapter(
        extract.pairs[0].tuned.file.parent,
        "peft",
        tuple(specs),
        tuple(replacements),
        base_model,
    )
    return adapter, outcomes


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
    experts = pair.tuned.shape[0] if pair.role == "experts" else 0
    rank = lora_A.shape[0] // max(1, experts)
    layout = {"conv": "conv", "embedding": "embedding", "experts": "experts"}.get(
        pair.role, "linear"
    )
    return DeltaSpec(
        "lowrank",
        module,
        parameter,
        {"lora_A": lora_A, "lora_B": lora_B},
        layout,
        rank,
        float(rank),
        1.0 / step.args.get("gain", 1.0),
        transposed=layout == "linear" and archs.is_conv1d(base.model_type, pair.module),
        experts=experts,
    )


def _complete_mha(
    specs: list[DeltaSpec], extract: ExtractPlan, base: Checkpoint
) -> list[DeltaSpec]:
    """PEFT adapts both projections of an attention module or none: zeros for the missing one."""
    have = {s.name for s in specs}
    out = list(specs)
    for pair, step in zip(extract.pairs, extract.plan.steps, strict=True):
        partner = (
            f"{pair.module}.out_proj.weight"
            if pair.role == "in_proj"
            else f"{pair.module.removesuffix('.out_proj')}.in_proj_weight"
            if step.args.get("gain")
            else None
        )
        if partner is None or not pair.is_factored:
            continue
        name = extract.memory_names[pair.name]
        if name not in have and extract.memory_names.get(partner, partner) in have:
            other = next(s for s in specs if s.name == extract.memory_names.get(partner, partner))
            rows, cols = pair.tuned.shape
            zeros = tuple(
                TensorData(f"{name} {role}", "F32", shape, bytes(4 * shape[0] * shape[1]))
                for role, shape in (("lora_A", (other.rank, cols)), ("lora_B", (rows, other.rank)))
            )
            out.append(_make_spec(pair, step, (zeros[0], zeros[1]), extract, base))
    return out


def _keepable(changed: Sequence[Pair], keep: Sequence[str]) -> list[Pair]:
    patterns = [compile_pattern(k) for k in keep if k not in KEEP_WORDS]
    kept = []
    for pair in changed:
        if pair.role == "bare":
            continue  # PEFT holds whole modules and biases, not bare parameters
        wanted = (
            (pair.role in ("bias", "small") and "none" not in keep)
            or "all" in keep
            or ("embeddings" in keep and pair.role in ("embedding", "head"))
            or any(p.search(pair.name) for p in patterns)
        )
        if wanted:
            kept.append(pair)
    return kept


def _replacements(kept: Sequence[Pair], extract: ExtractPlan) -> list[Replacement]:
    """Whole modules to save for everything but biases; every bias once one has changed."""
    everything = {p.name: p for p in (*extract.pairs, *extract.created)}
    modules = {p.module for p in kept if p.role != "bias"}
    found: dict[str, Replacement] = {}
    for name, pair in everything.items():
        memory = extract.memory_names[name]
        if pair.module in modules and not pair.is_factored:
            found[name] = Replacement(memory, pair.tuned, "modules_to_save")
    if any(p.role == "bias" and p.name not in found for p in kept):
        for name, pair in everything.items():
            if pair.role == "bias" and name not in found:
                found[name] = Replacement(extract.memory_names[name], pair.tuned, "bias")
    return list(found.values())
