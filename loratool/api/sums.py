"""Run a planned sum of adapters and make the adapter that holds it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loratool.adapter import Adapter, DeltaSpec, Replacement, TensorData
from loratool.delta.forms import new_vector, shape_of
from loratool.dtypes import tensor_bytes
from loratool.frozen import Frozen, replace
from loratool.methods import Method, find_method
from loratool.ops.combine import bias_steps, combine_steps
from loratool.ops.sums import SumPlan

if TYPE_CHECKING:
    from loratool.engine.run import RunOptions
    from loratool.engine.summing import SummedModule
    from loratool.store.reader import FileReader

_FP16 = "F16"


class Summed(Frozen):
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
    run: RunOptions,
    *,
    method: Method | None = None,
    params: Mapping[str, Any] | None = None,
) -> Summed:
    """Compute every module; float16 that overflows becomes float32 for all of them.

    Args:
        plan: what goes where.
        rank: asked for; None = the method's own.
        run: workers, each on modules of its own with one arithmetic thread.
        method: how modules are combined; None = their sum.
        params: of the method.
    """
    from loratool.engine.combining import mix_replacements
    from loratool.engine.detaching import blend
    from loratool.engine.kernel import Env
    from loratool.store.reader import FileReader

    how = method or find_method("cat"), params or {}, rank
    with FileReader() as reader:
        env = Env(reader)
        dtype = plan.dtype
        modules = _sum_all(plan, how, dtype, reader, run)
        if dtype == _FP16 and any(m.overflow for m in modules):
            dtype = "F32"
            modules = _sum_all(plan, how, dtype, reader, run)
        mixed = tuple(
            blend(mix.found, mix.base, env) if mix.base else mix_replacements(mix.found, env)
            for mix in plan.mixed
        )
        reader.check_unchanged()
    return Summed(modules, dtype, mixed)


def _sum_all(
    plan: SumPlan,
    how: tuple[Method, Mapping[str, Any], int | None],
    dtype: str,
    reader: FileReader,
    options: RunOptions,
) -> tuple[SummedModule, ...]:
    """Low-rank modules, then the biases, which are stored as their modules are."""
    from loratool.engine.run import execute
    from loratool.engine.summing import SummedModule

    method, params, rank = how
    weights = combine_steps(plan, method, params, rank, dtype)
    found = execute(weights, reader, None, options)
    made = {one.spec.module: one.spec for one in found}
    biases = bias_steps(plan, method, params, dtype, made)
    if biases.steps:
        found += execute(biases, reader, None, replace(options, progress=None))
        have = {one.spec.module for one in found[len(weights.steps) :]}
        alone = [s for s in made.values() if s.module not in have and plan.biases_follow]
        zeros = [_zero_bias(s, dtype) for s in alone]
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
            is_flat=first.is_flat,
            layer_order=plan.layer_order,
        )
    )


def _zero_bias(spec: DeltaSpec, dtype: str) -> DeltaSpec:
    """PEFT's ``lora_bias`` is one switch: every module has a bias delta, or none."""
    shape = shape_of(spec)[:1]
    data = TensorData(f"{spec.module} delta", dtype, shape, bytes(tensor_bytes(dtype, shape)))
    return new_vector(spec, data)
