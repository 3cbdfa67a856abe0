"""tuned - base: how large it is, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from loratool.adapter import TensorData
from loratool.engine import grid
from loratool.engine.kernel import Env, Kernel
from loratool.engine.measuring import count_differing
from loratool.engine.step_args import DifferenceArgs
from loratool.errors import NumericError
from loratool.frozen import Frozen
from loratool.linalg.norms import squared_sum, sum_of_squares
from loratool.linalg.rounding import INTEGERS
from loratool.plan import Step

_Sums = tuple[int, float, float] | tuple[torch.Tensor, torch.Tensor, torch.Tensor]


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
        wide_base = self.env.scratch.take("base", shape, wide, self.env.device).copy_(base)
        delta = self.room(block, wide).copy_(tuned).sub_(wide_base)
        if _has_bits(tuned, base):
            differing = count_differing(tuned, base)
        else:
            differing = int((_cast(base, tuned.dtype) != tuned).sum())
        square = sum_of_squares(delta) if differing or tuned.dtype != base.dtype else 0.0
        weight = sum_of_squares(wide_base)
        if not math.isfinite(weight):
            delta.masked_fill_(wide_base == tuned, 0.0)  # the same infinity is no difference
            square = sum_of_squares(delta)
            weight = sum_of_squares(wide_base.masked_fill_(~torch.isfinite(wide_base), 0.0))
        self.keep(block, tuned, delta)
        return differing, square, weight

    def _on_gpu(
        self, block: grid.Block, tuned: torch.Tensor, base: torch.Tensor, wide: torch.dtype
    ) -> _Sums:
        """The same without a question whose answer the GPU would have to be waited for.

        In few launches: threads give them one at a time.
        """
        wide_base = base.to(wide)
        delta = torch.sub(_float(tuned), wide_base, out=self.room(block, wide))
        delta.masked_fill_(wide_base == tuned, 0.0)
        if _has_bits(tuned, base):
            bits = INTEGERS[tuned.element_size()]
            differs = (tuned.view(bits) != base.view(bits)).any()
        else:
            differs = (_cast(base, tuned.dtype) != tuned).any()
        square = squared_sum(delta)
        weight = squared_sum(wide_base.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0))
        self.keep(block, tuned, delta)
        return differs, square, weight

    def room(self, block: grid.Block, dtype: torch.dtype) -> torch.Tensor:
        """Memory for the difference of a block, (rows, cols)."""
        shape = (block.r1 - block.r0, block.c1 - block.c0)
        return self.env.scratch.take("delta", shape, dtype, self.env.device)

    def keep(self, block: grid.Block, tuned: torch.Tensor, delta: torch.Tensor) -> None:
        """Called with the difference of each block, which is in its `room`."""

    def sizes(self) -> list[DifferenceResult]:
        """Add the blocks up, per pair.

        Raises:
            NumericError: one of two tensors that differ holds NaN, or infinity that the other
                does not have.
        """
        found = []
        for name, sums in zip(self.names, self._sums, strict=True):
            differing, squares, weights = _in_order(sums)
            is_equal, delta = not any(differing), math.fsum(squares)
            if is_equal and math.isnan(delta):  # the same NaN, bit for bit
                delta = 0.0
            if not math.isfinite(delta):
                raise NumericError(
                    "LT-803", "tuned or base tensor holds NaN or infinity", key=name,
                    expected="finite differences", hint="--exclude leaves a module out",
                )  # fmt: skip
            found.append(DifferenceResult(name, is_equal, delta, math.fsum(weights)))
        return found

    def finish(self) -> list[DifferenceResult]:
        """One result per pair."""
        return self.sizes()


def _in_order(sums: Mapping[int, _Sums]) -> list[list[Any]]:
    """What was measured of the blocks, each kind by itself; of a GPU fetched in one go."""
    kinds = list(zip(*(sums[i] for i in sorted(sums)), strict=True)) or [(), (), ()]
    return [
        torch.stack(kind).tolist() if kind and isinstance(kind[0], torch.Tensor) else list(kind)
        for kind in kinds
    ]


def _has_bits(tuned: torch.Tensor, base: torch.Tensor) -> bool:
    """Bits can be compared, as integers."""
    return tuned.dtype == base.dtype and tuned.element_size() in INTEGERS


def _float(tensor: torch.Tensor) -> torch.Tensor:
    """Integers as float64, which torch does not subtract from all of its types."""
    return tensor if tensor.is_floating_point() else tensor.double()


def _cast(base: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The base in the tuned tensor's type, if that is the narrower one: a cast is no change."""
    is_narrower = dtype.is_floating_point and dtype.itemsize < base.dtype.itemsize
    return base.to(dtype) if is_narrower else base
