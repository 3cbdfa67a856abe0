"""tuned - base as low-rank factors, of a rank that the spectrum decides."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import pad

from loratool.adapter import TensorData
from loratool.delta.lowrank import packed
from loratool.engine import grid
from loratool.engine.buffers import TORCH_DTYPES, to_bytes
from loratool.engine.difference import Difference, DifferenceResult
from loratool.engine.kernel import Env
from loratool.engine.step_args import SubtractAndFactorArgs
from loratool.frozen import replace
from loratool.linalg import fit
from loratool.linalg.noise import Grid, simulate_noise
from loratool.linalg.norms import squared_sums
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
        count = max(len(self.names), self.args.slots)
        self._deltas = self.env.pool.take((count, *view), device)
        if self.args.auto:
            types = [TORCH_DTYPES[s.dtype] for s in self.step.inputs[::2]]
            if self.args.is_joined:
                types, view = types[:1], (view[0] * len(self.names), view[1])
            self._grids = [Grid(view, dtype, device) for dtype in types]

    def room(self, block: grid.Block, dtype: torch.dtype) -> torch.Tensor:
        """The block's place in the whole difference."""
        assert self._deltas is not None
        if dtype != self._deltas.dtype:
            return super().room(block, dtype)
        return self._deltas[block.pair, block.r0 : block.r1, block.c0 : block.c1]

    def keep(self, block: grid.Block, tuned: torch.Tensor, delta: torch.Tensor) -> None:
        """Collect the block."""
        if delta.dtype != torch.float32:
            self.room(block, torch.float32).copy_(delta)
        if self._grids and self.args.is_joined:
            self._grids[0].take(tuned, block.pair * self.step.view[0] + block.r0, block.c0)
        elif self._grids:
            self._grids[block.pair].take(tuned, block.r0, block.c0)

    def sizes(self) -> list[DifferenceResult]:
        """Per pair, or of all of them together where they are one parameter."""
        found = super().sizes()
        if not self.args.is_joined:
            return found
        assert self._deltas is not None
        for delta, one in zip(self._deltas, found, strict=False):
            if one.is_equal:  # NaN less the same NaN is none
                delta.zero_()
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
        found = self.sizes()
        deltas, self._deltas = self._deltas, None
        assert deltas is not None
        found = self._factor(deltas, found)
        self.env.pool.give(deltas)
        return found

    def _factor(
        self, deltas: torch.Tensor, found: list[DifferenceResult]
    ) -> list[DifferenceResult]:
        at = [i for i, one in enumerate(found) if not one.is_equal]
        if not at:
            return found
        count = len(found) if self.args.is_joined else len(deltas)
        modules = deltas.view(count, max(1, self.args.experts), -1, deltas.shape[2])
        # A batch is always full: what a module gets does not depend on how many others there are.
        slots = [i if i in at else at[0] for i in range(count)]
        for slot, i in enumerate(slots):
            if slot != i:
                modules[slot].copy_(modules[i])
        how = self._how(modules, slots, found, at)
        turned = modules.mT if self.args.transposed else modules
        fits = dict(zip(at, fit.fit(turned, how), strict=True))
        losses = self._lost(turned, [fits[i][0] for i in slots])
        for i, (factors, choice) in fits.items():
            found[i] = replace(
                found[i],
                rank=choice.rank,
                noise_rank=choice.noise_rank,
                is_capped=choice.is_capped,
                energy_rank=choice.energy_rank,
                noise_square=_floor_square(how, i, modules.shape[1]),
                **self._made(factors, *losses[i], found[i]),
            )
        return found

    def _how(
        self,
        modules: torch.Tensor,
        slots: Sequence[int],
        found: Sequence[DifferenceResult],
        at: Sequence[int],
    ) -> fit.Fitting:
        """What the fit goes by; sizes are those of the float32 differences."""
        each = modules.shape[1]
        names = [self.step.output.name] if self.args.is_joined else self.names
        seeds = [_seed(f"{names[i]}[{e}]") for i in slots for e in range(each)]
        squares = squared_sums(modules.flatten(0, 1)).tolist()
        floors = None
        if self._grids:
            kept = [self._grids[i].exponents.view(each, -1, modules.shape[3]) for i in slots]
            bits = [self._grids[i].significand_bits for i in slots for _ in range(each)]
            exponents = kept[0] if len(kept) == 1 else torch.cat(kept)
            floors = simulate_noise(exponents, bits, delta_squares=squares, seeds=seeds)
            self._grids = []  # not before: another worker's stream may get their memory
        return fit.Fitting(
            RankRule(**(self.args.rule or {})), seeds, squares, floors,
            [found[i].weight_square**0.5 for i in slots], exact=self.args.exact,
            is_sliceable=self.args.slices, wanted=at,
        )  # fmt: skip

    def _lost(
        self, modules: torch.Tensor, factors: Sequence[fit.Factors]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Per module what its factors leave out as written, and what float16 would lose."""
        rank, each = max(one.lora_A.shape[1] for one in factors), modules.shape[1]
        if rank == 0:
            return [(torch.zeros(each), torch.zeros(each))] * len(factors)
        lora_B = torch.cat([pad(one.lora_B, (0, rank - one.lora_B.shape[2])) for one in factors])
        lora_A = torch.cat(
            [pad(one.lora_A, (0, 0, 0, rank - one.lora_A.shape[1])) for one in factors]
        )
        left: Sequence[torch.Tensor]
        if self.args.slices:  # of each up to its own rank
            left = [
                torch.stack([fit.residual_squares(*pair) for pair in zip(
                    stack, one.lora_B, one.lora_A, strict=True)])
                for stack, one in zip(modules, factors, strict=True)
            ]  # fmt: skip
        else:
            lost = fit.residual_square(modules.flatten(0, 1), lora_B, lora_A)
            left = torch.split(lost[:, None].cpu(), each)
        cast = fit.cast_square(lora_B, lora_A, torch.float16).cpu()
        return list(zip(left, torch.split(cast, each), strict=True))

    def _made(
        self,
        factors: fit.Factors,
        left: torch.Tensor,
        cast: torch.Tensor,
        found: DifferenceResult,
    ) -> dict[str, Any]:
        """The factors as stored, and what they leave out."""
        if factors.lora_A.shape[1] == 0:
            return {"residual_squares": (found.delta_square,)}
        curve = sum(left)
        assert isinstance(curve, torch.Tensor)
        return {
            "residual_squares": tuple((curve.clamp_min(0) if self.args.slices else curve).tolist()),
            "cast_square": sum(cast.tolist()),
            "spectrum": tuple(factors.singular_values.square().sum(0).tolist()),
            "factors": as_stored(
                factors.lora_A, factors.lora_B * self.args.gain, self.args, found.name
            ),
        }  # fmt: skip


def _floor_square(how: fit.Fitting, module: int, each: int) -> float:
    if how.floors is None:
        return 0.0
    return sum(f.square for f in how.floors[module * each : (module + 1) * each])


def _seed(name: str) -> int:
    """A seed that depends on the name alone: order and company do not matter."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "little")


def as_stored(
    lora_A: torch.Tensor, lora_B: torch.Tensor, args: SubtractAndFactorArgs, name: str,
    dtype: str = "F32",
) -> tuple[TensorData, TensorData]:  # fmt: skip
    """Stacked factors (E, r, in), (E, out, r) in the shapes and packing that PEFT stores."""
    left, right = packed(lora_B, lora_A, experts=args.experts, kernel=args.kernel)
    made = [
        TensorData(f"{name} factor", dtype, tuple(t.shape),
                   to_bytes(_alone(t.to(TORCH_DTYPES[dtype]))))
        for t in (right, left)
    ]  # fmt: skip
    return made[0], made[1]


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor on the CPU that keeps nothing but itself in memory."""
    tensor = tensor.cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
