"""Kernels of steps that are one module of one or several adapters: nothing is streamed."""

from __future__ import annotations

from loratool.engine.combining import Recipe, combine_factors, combine_vectors
from loratool.engine.comparison import PairResult, compare_module, gram
from loratool.engine.kernel import ModuleKernel
from loratool.engine.module_memory import specs_of
from loratool.engine.rescaling import ScaledTensors, scale_module
from loratool.engine.risk import (
    IntruderResult,
    look_for_intruders,
    measure_module,
)
from loratool.engine.risk import ModuleStatistics as Statistics
from loratool.engine.step_args import CombineArgs, IntruderArgs, ScaleArgs
from loratool.engine.summing import SummedModule
from loratool.methods import find_method
from loratool.plan import DeltaPart, Place


class Combine(ModuleKernel):
    """One module of several adapters made into one pair of factors, or one bias delta."""

    args: CombineArgs

    def finish(self) -> SummedModule:
        """New factors."""
        args = self.args
        terms = [p for p in self.step.parts if isinstance(p, DeltaPart)]
        how = Recipe(find_method(args.method), args.params, args.asked)
        if args.like.is_matrix:
            return combine_factors(
                args.like, terms, self.env, how, gain=args.gain, rank=args.rank,
                alpha=args.alpha, dtype=args.dtype,
            )  # fmt: skip
        return combine_vectors(
            args.like, terms, self.env, how, scaling=args.scaling, alpha=args.stored_alpha,
            dtype=args.dtype,
        )  # fmt: skip


class CompareModules(ModuleKernel):
    """Two adapters' changes of one module."""

    def finish(self) -> PairResult:
        """Everything about them."""
        one, two = specs_of(self.step)
        return compare_module(one, two, self.env)


class Gram(ModuleKernel):
    """Inner products of several adapters' changes of one module."""

    def finish(self) -> dict[tuple[int, int], float]:
        """By the positions of the adapters."""
        parts = [p for p in self.step.parts if isinstance(p, DeltaPart)]
        return gram({p.adapter: p.spec for p in parts}, self.env)


class ModuleStatistics(ModuleKernel):
    """Numbers of one module."""

    def finish(self) -> Statistics:
        """From its factors, and some rows."""
        (spec,) = specs_of(self.step)
        return measure_module(spec, self.env)


class FindIntruders(ModuleKernel):
    """Intruder dimensions of one delta in the weight that it lies on (the input)."""

    args: IntruderArgs

    def finish(self) -> IntruderResult:
        """Found, and weakened if that is asked for."""
        (part,), (source,) = self.step.parts, self.step.inputs
        assert isinstance(part, DeltaPart)
        place = Place(part, source, self.step.view)
        return look_for_intruders(place, self.env, self.args.weaken)


class ScaleModule(ModuleKernel):
    """Tensors of one module multiplied in float64 and rounded once."""

    args: ScaleArgs

    def finish(self) -> ScaledTensors:
        """Those that change."""
        (spec,) = specs_of(self.step)
        return scale_module(spec, self.args, self.env)
