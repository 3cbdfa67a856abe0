"""Run a planned sum of adapters and make the adapter that holds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from loratool.adapter import Adapter, DeltaSpec, Replacement, TensorData
from loratool.delta.forms import new_vector, shape_of
from loratool.dtypes import tensor_bytes
from loratool.methods import Method, find_method
from loratool.ops.combine import rank_of
from loratool.ops.sums import SumModule, SumPlan

if TYPE_CHECKING:
    from loratool.engine.combining import Recipe
    from loratool.engine.kernel import Env
    from loratool.engine.run import Progress
    from loratool.engine.summing import SummedModule

_FP16 = "F16"


@dataclass(frozen=True)
class Summed:
    """The results for the modules of a plan, and the storage type that holds them.

    Attributes:
        modules: in the order of the plan, then zero biases where others have one.
        dtype: safetensors name.
        mixed: averaged replacements.
    """

    modules: tuple[SummedModule, ...]
    dtype: str
    mixed: tuple[Replacement, ...] = ()


def run_sum(
    plan: SumPlan,
    rank: int | None,
    *,
    method: Method | None = None,
    params: Mapping[str, Any] | None = None,
    threads: int,
    progress: Progress | None = None,
) -> Summed:
    """Compute every module; float16 that overflows becomes float32 for all of them.

    Args:
        plan: what goes where.
        rank: asked for; None = the method's own.
        method: how modules are combined; None = their sum.
        params: of the method.
        threads: workers, each on modules of its own with one arithmetic thread.
        progress: called with (modules done, modules in all).
    """
    from loratool.engine.combining import Recipe, mix_replacements
    from loratool.engine.detaching import blend
    from loratool.engine.factors import make_env
    from loratool.store.reader import FileReader

    with FileReader() as reader:
        env = make_env(reader)
        how = Recipe(method or find_method("cat"), params or {}, rank)
        run = partial(_sum_all, plan, how, env=env, threads=threads, progress=progress)
        dtype = plan.dtype
        modules = run(dtype)
        if dtype == _FP16 and any(m.overflow for m in modules):
            dtype = "F32"
            modules = run(dtype)
        mixed = tuple(
            blend(mix.found, mix.base, env) if mix.base else mix_replacements(mix.found, env)
            for mix in plan.mixed
        )
        reader.check_unchanged()
    return Summed(modules, dtype, mixed)


def _sum_all(
    plan: SumPlan,
    how: Recipe,
    dtype: str,
    *,
    env: Env,
    threads: int,
    progress: Progress | None,
) -> tuple[SummedModule, ...]:
    from loratool.engine.combining import combine_factors, combine_vectors
    from loratool.engine.summing import SummedModule
    from loratool.engine.workers import map_in_workers

    alphas = _alphas(plan)
    weights = [m for m in plan.modules if not m.is_bias]
    biases = [m for m in plan.modules if m.is_bias]

    def work(module: SumModule) -> SummedModule:
        return combine_factors(
            module.spec, module.terms, env, how, gain=module.gain,
            rank=rank_of(module, how.method, how.rank), alpha=alphas[module.spec.name],
            dtype=dtype,
        )  # fmt: skip

    def advance(count: int) -> None:
        if progress is not None:
            progress(count, len(weights))

    found = map_in_workers(work, weights, threads, advance)
    made = {one.spec.module: one.spec for one in found}
    for module in biases:
        owner = made[module.spec.module]
        found.append(
            combine_vectors(module.spec, module.terms, env, how, scaling=owner.scaling,
                            alpha=owner.alpha, dtype=dtype)
        )  # fmt: skip
    if biases:
        have = {m.spec.module for m in biases}
        zeros = [_zero_bias(s, dtype) for s in made.values() if s.module not in have]
        found += [SummedModule(spec, 0.0, 0.0) for spec in zeros]
    return tuple(found)


def assemble_sum(plan: SumPlan, summed: Summed, first: Adapter) -> Adapter:
    """The adapter that holds the result; it keeps what the first one says about its base."""
    from loratool.engine.tying import tie_factors

    return tie_factors(
        Adapter(
            first.path,
            first.dialect,
            tuple(m.spec for m in summed.modules),
            (*plan.replacements, *summed.mixed),
            plan.base_model,
            plan.config,
            carried=plan.passed,
            layer_order=plan.layer_order,
        )
    )


def _alphas(plan: SumPlan) -> dict[str, int | None]:
    """Alpha by module; out_proj of nn.MultiheadAttention has that of its in_proj (PEFT)."""
    weights = [m for m in plan.modules if not m.is_bias]
    found = {m.spec.name: None if plan.is_even else m.shared_alpha for m in weights}
    for module in plan.modules:
        if module.gain != 1:
            mha = module.spec.module.removesuffix(".out_proj")
            found[module.spec.name] = found[f"{mha}.in_proj_weight"]
    return found


def _zero_bias(spec: DeltaSpec, dtype: str) -> DeltaSpec:
    """PEFT's ``lora_bias`` is one switch: every module has a bias delta, or none."""
    shape = shape_of(spec)[:1]
    data = TensorData(f"{spec.module} delta", dtype, shape, bytes(tensor_bytes(dtype, shape)))
    return new_vector(spec, data)
