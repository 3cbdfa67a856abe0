"""tuned - base, and its best low-rank factors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from loratool.adapter import TensorData
from loratool.engine import grid
from loratool.engine.buffers import to_bytes
from loratool.engine.kernel import INTEGERS, Env, Kernel
from loratool.engine.merging import count_differing
from loratool.errors import NumericError
from loratool.linalg import svd
from loratool.plan import Step


@dataclass(frozen=True)
class DifferenceResult:
    """How a tuned tensor differs from the base's, and its low-rank factors if asked for.

    Attributes:
        name: tensor.
        is_equal: no bit differs.
        delta_square: Σ(tuned - base)².
        weight_square: Σ base².
        captured: share of ΣΔ² that the factors hold, as written.
        residual_square: Σ(Δ - lora_B @ lora_A)², as written.
        factors: (lora_A, lora_B) in PEFT shapes, None if none were asked for or Δ = 0.
        singular_values: those kept; one tuple per expert.
    """

    name: str
    is_equal: bool
    delta_square: float
    weight_square: float
    captured: float = 0.0
    residual_square: float = 0.0
    factors: tuple[TensorData, TensorData] | None = None
    singular_values: tuple[tuple[float, ...], ...] = ()


class Difference(Kernel):
    """tuned - base: its size only."""

    def __init__(self, step: Step, env: Env) -> None:
        super().__init__(step, env)
        self._sums: dict[int, tuple[int, float, float]] = {}

    def run(self, block: grid.Block, inputs: list[torch.Tensor], out: torch.Tensor | None) -> None:
        """Differences in float32 at least; exact for bfloat16 pairs of near exponents."""
        tuned, base = inputs
        wide = torch.promote_types(torch.promote_types(tuned.dtype, base.dtype), torch.float32)
        if not tuned.is_floating_point():
            wide = torch.float64
        delta = tuned.to(wide) - base.to(wide)
        if tuned.dtype == base.dtype and tuned.element_size() in INTEGERS:
            differing = count_differing(tuned, base)
        else:
            differing = int((delta != 0).sum())
        square = float(delta.double().square().sum())
        if not math.isfinite(square):  # the same infinity on both sides is no difference
            delta = delta.masked_fill(tuned.to(wide) == base.to(wide), 0.0)
            square = float(delta.double().square().sum())
        weight = float(torch.where(torch.isfinite(base), base, 0).double().square().sum())
        self._sums[block.index] = (differing, square, weight)
        if differing:
            self.keep(block, delta)

    def keep(self, block: grid.Block, delta: torch.Tensor) -> None:
        """Called with each block that differs."""

    def finish(self) -> DifferenceResult:
        """Add the blocks up.

        Raises:
            NumericError: one of the tensors holds NaN or infinity.
        """
        sums = [self._sums[i] for i in sorted(self._sums)]
        delta = math.fsum(s[1] for s in sums)
        if not math.isfinite(delta):
            raise NumericError(
                "LT-803", "tuned or base tensor holds NaN or infinity", key=self.step.output.name,
                expected="finite differences", hint="--exclude leaves a module out",
            )  # fmt: skip
        return DifferenceResult(
            self.step.output.name,
            not any(s[0] for s in sums),
            delta,
            math.fsum(s[2] for s in sums),
        )


class SubtractAndFactor(Difference):
    """tuned - base and its best low-rank factors (one pair per expert for 3-D weights)."""

    def __init__(self, step: Step, env: Env) -> None:
        super().__init__(step, env)
        self._delta: torch.Tensor | None = None

    def prepare(self) -> None:
        """Make room for the whole difference."""
        self._delta = torch.zeros(self.step.view, dtype=torch.float32, device=self.env.device)

    def keep(self, block: grid.Block, delta: torch.Tensor) -> None:
        """Collect the block."""
        assert self._delta is not None
        self._delta[block.r0 : block.r1, block.c0 : block.c1] = delta

    def finish(self) -> DifferenceResult:
        """Factor what was collected."""
        found = super().finish()
        delta, self._delta = self._delta, None
        if found.is_equal or delta is None:
            return found
        args = self.step.args
        experts = int(args.get("experts", 0))
        slabs = delta.view(experts, -1, delta.shape[1]) if experts else delta[None]
        turned = [s.T if args["transposed"] else s for s in slabs]
        rank = int(args["rank"])
        is_full = rank >= min(turned[0].shape)
        fits = [svd.whole(t) if is_full else svd.best_rank(t, rank) for t in turned]
        gain = float(args.get("gain", 1.0))
        lora_A = torch.stack([f.lora_A for f in fits]).float()  # (E, r, in)
        lora_B = torch.stack([f.lora_B * gain for f in fits]).float()  # (E, out, r)
        residual = 0.0
        for slab, one_A, one_B in zip(slabs, lora_A, lora_B, strict=True):
            made = (one_B.double() / gain) @ one_A.double()
            residual += float((slab - (made.T if args["transposed"] else made)).square().sum())
        return replace(
            found,
            captured=1 - residual / found.delta_square,
            residual_square=residual,
            factors=_as_stored(lora_A, lora_B, args, found.name),
            singular_values=tuple(tuple(f.singular_values.tolist()) for f in fits),
        )


def _as_stored(
    lora_A: torch.Tensor, lora_B: torch.Tensor, args: Mapping[str, Any], name: str
) -> tuple[TensorData, TensorData]:
    """Stacked factors (E, r, in), (E, out, r) in the shapes and packing that PEFT stores."""
    if int(args.get("experts", 0)):
        lora_A = lora_A.flatten(0, 1)  # (E·r, in)
        lora_B = lora_B.permute(1, 2, 0).flatten(1)  # (out, r·E)
    else:
        lora_A, lora_B = lora_A[0], lora_B[0]
        kernel = tuple(args.get("kernel", ()))
        if kernel:
            lora_A = lora_A.reshape(lora_A.shape[0], -1, *kernel)
            lora_B = lora_B.reshape(*lora_B.shape, *(1 for _ in kernel))
    return tuple(  # type: ignore[return-value]
        TensorData(f"{name} {role}", "F32", tuple(t.shape), bytes(to_bytes(t)))
        for role, t in (("lora_A", lora_A), ("lora_B", lora_B))
    )
