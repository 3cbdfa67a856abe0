"""Kernels of steps that are one module of one or several adapters: nothing is streamed."""

from __future__ import annotations

from loratool.engine.combining import Recipe, combine_factors, combine_vectors
from loratool.engine.kernel import WholeKernel
from loratool.engine.step_args import CombineArgs
from loratool.engine.summing import SummedModule
from loratool.methods import find_method
from loratool.plan import DeltaPart


class Combine(WholeKernel):
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
