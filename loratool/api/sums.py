"""Run a planned sum of adapters and make the adapter that holds it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratool.adapter import Adapter, DeltaSpec, TensorData
from loratool.dtypes import tensor_bytes
from loratool.ops.sums import SumPlan

if TYPE_CHECKING:
    from loratool.engine.kernel import Env
    from loratool.engine.summing import SummedModule

_FP16 = "F16"


@dataclass(frozen=True)
class Summed:
    """The results for the modules of a plan, and the storage type that holds them.

    Attributes:
        modules: in the order of the plan, then zero biases where others have one.
        dtype: safetensors name.
    """

    modules: tuple[SummedModule, ...]
    dtype: str


def run_sum(plan: SumPlan, rank: int | None) -> Summed:
    """Compute every module; float16 that overflows becomes float32 for all of them."""
    from loratool.engine.factors import make_env
    from loratool.store.reader import FileReader

    with FileReader() as reader:
        env = make_env(reader)
        found = Summed(_sum_all(plan, rank, plan.dtype, env), plan.dtype)
        if plan.dtype == _FP16 and any(m.overflow for m in found.modules):
            found = Summed(_sum_all(plan, rank, "F32", env), "F32")
        reader.check_unchanged()
    return found


def _sum_all(plan: SumPlan, rank: int | None, dtype: str, env: Env) -> tuple[SummedModule, ...]:
    from loratool.engine.summing import SummedModule, sum_factors, sum_vectors

    alphas = _alphas(plan)
    made: dict[str, DeltaSpec] = {}
    found: list[SummedModule] = []
    biases = [m for m in plan.modules if m.is_bias]
    for module in plan.modules:
        if module.is_bias:
            continue
        one = sum_factors(
            module.spec, module.terms, env, gain=module.gain,
            alpha=alphas[module.spec.name], rank=rank, dtype=dtype,
        )  # fmt: skip
        made[one.spec.module] = one.spec
        found.append(one)
    for module in biases:
        owner = made[module.spec.module]
        found.append(
            sum_vectors(module.spec, module.terms, env, scaling=owner.scaling,
                        alpha=owner.alpha, dtype=dtype)
        )  # fmt: skip
    if biases:
        have = {m.spec.module for m in biases}
        zeros = [_zero_bias(s, dtype) for s in made.values() if s.module not in have]
        found += [SummedModule(spec, 0.0, 0.0) for spec in zeros]
    return tuple(found)


def assemble_sum(plan: SumPlan, summed: Summed, first: Adapter) -> Adapter:
    """The adapter that holds the result; it keeps what the first one says about its base."""
    return Adapter(
        first.path,
        first.dialect,
        tuple(m.spec for m in summed.modules),
        plan.replacements,
        plan.base_model,
        plan.config,
        layer_order=plan.layer_order,
    )


def _alphas(plan: SumPlan) -> dict[str, int | None]:
    """Alpha by module; out_proj of nn.MultiheadAttention has that of its in_proj (PEFT)."""
    found = {m.spec.name: m.shared_alpha for m in plan.modules if not m.is_bias}
    for module in plan.modules:
        if module.gain != 1:
            mha = module.spec.module.removesuffix(".out_proj")
            found[module.spec.name] = found[f"{mha}.in_proj_weight"]
    return found


def _zero_bias(spec: DeltaSpec, dtype: str) -> DeltaSpec:
    """PEFT's ``lora_bias`` is one switch: every module has a bias delta, or none."""
    shape = spec.fields["lora_B"].shape[:1]
    data = TensorData(f"{spec.module} delta", dtype, shape, bytes(tensor_bytes(dtype, shape)))
    return DeltaSpec("vector", spec.module, "bias", {"delta": data}, "vector", 0,
                     spec.alpha, spec.scaling)  # fmt: skip
