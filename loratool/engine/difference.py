"""tuned - base: how large it is, tensor by tensor."""

from __future__ import annotations

import math

import torch

from loratool.adapter import TensorData
from loratool.engine import grid
from loratool.engine.buffers import INTEGERS
from loratool.engine.kernel import Env, Kernel
from loratool.engine.measuring import count_differing
from loratool.engine.step_args import DifferenceArgs
from loratool.errors import NumericError
from loratool.frozen import Frozen
from loratool.linalg.norms import squared_sum, sum_of_squares
from loratool.plan import Step

_Sums = tuple[int, float, float] | torch.Tensor


class DifferenceResult(Frozen):
    """How a tuned tensor differs from the base's, and its low-rank factors if asked for.

    Attributes:
        name: tensor.
        is_equal: no bit differs, or none but by the cast to a narrower type.
        delta_square: Σ(tuned - base)².
        weight_square: Σ base².
        factors: (lora_A, lora_B) in PEFT shapes, None if none were asked for, Δ = 0, or rank 0.
        rank: of the factors (per expert).
        residual_squares: Σ(Δ - lora_B @ lora_A)² as written; with more than one entry, that at
            rank 0, 1, 2 …
        cast_square: how far storing the factors as float16 would move lora_B @ lora_A, squared.
        spectrum: squared singular values, of all experts together.
        noise_rank: singular values above the rounding noise, None where it was not asked for.
        is_capped: there may be more of them.
        energy_rank: least rank with 99 % of the energy above the noise, None if not known.
        noise_square: expected ‖rounding noise‖².
    """

    name: str
    is_equal: bool
    delta_square: float
    weight_square: float
    factors: tuple[TensorData, TensorData] | None = None
    rank: int = 0
    residual_squares: tuple[float, ...] = ()
    cast_square: float = 0.0
    spectrum: tuple[float, ...] = ()
    noise_rank: int | None = None
    is_capped: bool = False
    energy_rank: int | None = None
    noise_square: float = 0.0


class Difference(Kernel):
    """tuned - base: its size only.  Inputs come in pairs (tuned, base)."""

    args: DifferenceArgs

    def __init__(self, step: Step, env: Env) -> None:
        super().__init__(step, env)
        self.names: list[str] = list(self.args.names or [step.output.name])
        # per pair and block: elements that differ, Σ(tuned - base)², Σ base²
        self._sums: list[dict[int, _Sums]] = [{} for _ in self.names]

    def run(self, block: grid.Block, inputs: list[torch.Tensor], out: torch.Tensor | None) -> None:
        """Differences in float32 at least; exact for bfloat16 pairs of near exponents."""
        tuned, base = inputs
        wide = torch.promote_types(torch.promote_types(tuned.dtype, base.dtype), torch.float32)
        if not tuned.is_floating_point():
            wide = torch.float64
        measure = self._on_gpu if self.env.device.type == "cuda" else self._on_cpu
        self._sums[block.pair][block.index] = measure(block, tuned, base, wide)

    def _on_cpu(
        self, block: grid.Block, tuned: torch.Tensor, base: torch.Tensor, wide: torch.dtype
    ) -> _Sums:
        shape = (block.r1 - block.r0, block.c1 - block.c0)
        take = self.env.scratch.take
        wide_base = take("base", shape, wide, self.env.device).copy_(base)
        delta = take("delta", shape, wide, self.env.device).copy_(tuned).sub_(wide_base)
        if tuned.dtype == base.dtype and tuned.element_size() in INTEGERS:
            differing = count_differing(tuned, base)
        else:
            differing = int((_cast(base, tuned.dtype) != tuned).sum())
        square = sum_of_squares(delta) if differing or tuned.dtype != base.dtype else 0.0
        if not math.isfinite(square):  # the same infinity on both sides is no difference
            delta = delta.masked_fill(tuned.to(wide) == wide_base, 0.0)
            square = sum_of_squares(delta)
        weight = sum_of_squares(wide_base)
        if not math.isfinite(weight):
            weight = sum_of_squares(wide_base.masked_fill(~torch.isfinite(wide_base), 0.0))
        self.keep(block, tuned, delta if differing else None)
        return differing, square, weight

    def _on_gpu(
        self, block: grid.Block, tuned: torch.Tensor, base: torch.Tensor, wide: torch.dtype
    ) -> _Sums:
        """The same without a question whose answer the GPU would have to be waited for."""
        wide_base = base.to(wide)
        delta = tuned.to(wide) - wide_base
        if tuned.dtype == base.dtype and tuned.element_size() in INTEGERS:
            bits = INTEGERS[tuned.element_size()]
            differs = tuned.view(bits) != base.view(bits)
            is_same = ~differs
        else:
            differs = _cast(base, tuned.dtype) != tuned
            is_same = tuned.to(wide) == wide_base
        delta.masked_fill_(is_same, 0.0)  # the same infinity on both sides is no difference
        differing = torch.count_nonzero(differs)
        square = squared_sum(delta) + torch.where(torch.isnan(base).any(), math.nan, 0.0)
        if tuned.dtype == base.dtype:
            square = torch.where(differing > 0, square, 0.0)
        weight = squared_sum(torch.nan_to_num(wide_base, nan=0.0, posinf=0.0, neginf=0.0))
        self.keep(block, tuned, delta)
        return torch.stack([differing.double(), square, weight])

    def keep(self, block: grid.Block, tuned: torch.Tensor, delta: torch.Tensor | None) -> None:
        """Called with each block; ``delta`` is None where nothing differs."""

    def sizes(self) -> list[DifferenceResult]:
        """Add the blocks up, per pair.

        Raises:
            NumericError: one of the tensors holds NaN or infinity.
        """
        found = []
        for name, sums in zip(self.names, self._sums, strict=True):
            ordered = [sums[i] for i in sorted(sums)]
            parts = [s.tolist() if isinstance(s, torch.Tensor) else s for s in ordered]
            delta, weight = (math.fsum(p[i] for p in parts) for i in (1, 2))
            if not math.isfinite(delta):
                raise NumericError(
                    "LT-803", "tuned or base tensor holds NaN or infinity", key=name,
                    expected="finite differences", hint="--exclude leaves a module out",
                )  # fmt: skip
            found.append(DifferenceResult(name, not any(p[0] for p in parts), delta, weight))
        return found

    def finish(self) -> list[DifferenceResult]:
        """One result per pair."""
        return self.sizes()


def _cast(base: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The base in the tuned tensor's type, if that is the narrower one: a cast is no change."""
    is_narrower = dtype.is_floating_point and dtype.itemsize < base.dtype.itemsize
    return base.to(dtype) if is_narrower else base
