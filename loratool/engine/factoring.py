"""tuned - base as low-rank factors, of a rank that the spectrum decides."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from loratool.adapter import TensorData
from loratool.delta.lowrank import packed
from loratool.engine import grid
from loratool.engine.buffers import TORCH_DTYPES, to_bytes
from loratool.engine.difference import Difference, DifferenceResult
from loratool.engine.kernel import Env
from loratool.engine.step_args import SubtractAndFactorArgs
from loratool.linalg import fit
from loratool.linalg.noise import Grid, simulate_noise
from loratool.linalg.norms import sum_of_squares
from loratool.linalg.rank import RankRule
from loratool.plan import Step


class SubtractAndFactor(Difference):
    """Low-rank factors of tuned - base (one pair per expert for 3-D weights)."""

    args: SubtractAndFactorArgs

    def __init__(self, step: Step, env: Env) -> None:
        super().__init__(step, env)
        self._deltas: torch.Tensor | None = None  # (pairs, rows, cols) float32
        self._grids: list[Grid] = []

    def prepare(self) -> None:
        """Make room for the whole differences."""
        device, view = self.env.device, self.step.view
        self._deltas = self.env.pool.take((len(self.names), *view), device)
        if self.args.auto:
            types = [TORCH_DTYPES[s.dtype] for s in self.step.inputs[::2]]
            if self.args.is_joined:
                types, view = types[:1], (view[0] * len(self.names), view[1])
            self._grids = [Grid(view, dtype, device) for dtype in types]

    def keep(self, block: grid.Block, tuned: torch.Tensor, delta: torch.Tensor | None) -> None:
        """Collect the block."""
        assert self._deltas is not None
        room = self._deltas[block.pair, block.r0 : block.r1, block.c0 : block.c1]
        room.zero_() if delta is None else room.copy_(delta)
        if self._grids and self.args.is_joined:
            self._grids[0].take(tuned, block.pair * self.step.view[0] + block.r0, block.c0)
        elif self._grids:
            self._grids[block.pair].take(tuned, block.r0, block.c0)

    def sizes(self) -> list[DifferenceResult]:
        """Per pair, or of all of them together where they are one parameter."""
        found = super().sizes()
        if not self.args.is_joined:
            return found
        return [
            DifferenceResult(
                self.step.output.name,
                all(one.is_equal for one in found),
                math.fsum(one.delta_square for one in found),
                math.fsum(one.weight_square for one in found),
            )
        ]

    def finish(self) -> list[DifferenceResult]:
        """Factor what was collected."""
        deltas, self._deltas = self._deltas, None
        assert deltas is not None
        found = self._factor(deltas, self.sizes())
        self.env.pool.give(deltas)
        return found

    def _factor(
        self, deltas: torch.Tensor, found: list[DifferenceResult]
    ) -> list[DifferenceResult]:
        at = [i for i, one in enumerate(found) if not one.is_equal]
        if not at:
            return found
        each = max(1, self.args.experts)
        modules = deltas if len(at) == len(found) else deltas[at]
        modules = modules.view(len(at), each, -1, deltas.shape[2])  # (pairs, E, rows, cols)
        how = self._how(modules, at, [found[i].weight_square for i in at])
        turned = modules.mT if self.args.transposed else modules
        for i, stack, (factors, choice) in zip(at, turned, fit.fit(turned, how), strict=True):
            found[i] = replace(
                found[i],
                rank=choice.rank,
                noise_rank=choice.noise_rank,
                is_capped=choice.is_capped,
                energy_rank=choice.energy_rank,
                noise_square=_floor_square(how, at.index(i), each),
                **self._measure_factors(stack, factors, found[i]),
            )
        return found

    def _how(
        self, modules: torch.Tensor, at: Sequence[int], weights: Sequence[float]
    ) -> fit.Fitting:
        """What the fit goes by; sizes are those of the float32 differences."""
        each = modules.shape[1]
        names = [self.step.output.name] if self.args.is_joined else self.names
        seeds = [_seed(f"{names[i]}[{e}]") for i in at for e in range(each)]
        squares = [sum_of_squares(m) for m in modules.flatten(0, 1)]
        floors = None
        if self._grids:
            floors = []
            for n, i in enumerate(at):
                mine = slice(n * each, (n + 1) * each)
                kept = self._grids[i]
                floors += simulate_noise(
                    kept.exponents.view(each, -1, modules.shape[3]),
                    kept.significand_bits,
                    delta_squares=squares[mine],
                    seeds=seeds[mine],
                )
            self._grids = []
        return fit.Fitting(
            RankRule(**(self.args.rule or {})), seeds, squares, floors, [w**0.5 for w in weights],
            exact=self.args.exact, is_sliceable=self.args.slices,
        )  # fmt: skip

    def _measure_factors(
        self, stack: torch.Tensor, factors: fit.Factors, found: DifferenceResult
    ) -> dict[str, Any]:
        """The factors as stored, and what they leave out as written."""
        if factors.lora_A.shape[1] == 0:
            return {"residual_squares": (found.delta_square,)}
        pairs = list(zip(stack, factors.lora_B, factors.lora_A, strict=True))
        if self.args.slices:
            curve = sum(fit.residual_squares(*pair) for pair in pairs)
            assert isinstance(curve, torch.Tensor)
            residuals = tuple(curve.clamp_min(0).tolist())
        else:
            residuals = (sum(fit.residual_square(*pair) for pair in pairs),)
        gain = self.args.gain
        return {
            "residual_squares": residuals,
            "cast_square": sum(fit.cast_square(B, A, torch.float16) for _, B, A in pairs),
            "spectrum": tuple(factors.singular_values.square().sum(0).tolist()),
            "factors": as_stored(factors.lora_A, factors.lora_B * gain, self.args, found.name),
        }


def _floor_square(how: fit.Fitting, module: int, each: int) -> float:
    if how.floors is None:
        return 0.0
    return sum(f.square for f in how.floors[module * each : (module + 1) * each])


def _seed(name: str) -> int:
    """A seed that depends on the name alone: order and company do not matter."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "little")


def as_stored(
    lora_A: torch.Tensor, lora_B: torch.Tensor, args: SubtractAndFactorArgs, name: str
) -> tuple[TensorData, TensorData]:
    """Stacked factors (E, r, in), (E, out, r) in the shapes and packing that PEFT stores."""
    left, right = packed(lora_B, lora_A, experts=args.experts, kernel=args.kernel)
    made = [
        TensorData(f"{name} factor", "F32", tuple(t.shape), bytes(to_bytes(t)))
        for t in (right, left)
    ]
    return made[0], made[1]
