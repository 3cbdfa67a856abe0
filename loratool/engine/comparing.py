"""Is a merged tensor what merging would write?"""

from __future__ import annotations

import math

import torch

from loratool.dtypes import DTYPES
from loratool.engine import grid
from loratool.engine.buffers import TORCH_DTYPES
from loratool.engine.kernel import Env, Kernel
from loratool.engine.merging import AddDeltas
from loratool.frozen import Frozen
from loratool.linalg import rounding
from loratool.linalg.rounding import INTEGERS
from loratool.plan import DeltaPart, Step

_UNIT = 2.0**-24  # of float32, to nearest


class CompareResult(Frozen):
    """How one tensor of a merged checkpoint compares with its recomputation.

    Attributes:
        name: tensor.
        numel: elements.
        differing: elements whose bits differ.
        outside: elements further apart than another order of rounding explains, see `Compare`.
        max_ulp: largest distance in ulp(W').
        delta_square: ΣΔ².
        residual_square: Σ(M - W')².
        along: Σ(M - W')Δ.
    """

    name: str
    numel: int
    differing: int
    outside: int
    max_ulp: float
    delta_square: float
    residual_square: float
    along: float = 0.0


class Compare(AddDeltas):
    """Recompute a merge and compare it with the tensor at hand (the last input).

    Another program may round the result once per adapter, ΔW to the type of the factors, and every
    product and partial sum to float32.  With k such roundings on the way the distance is at most

        ulp(W')·max(1, adapters/2) + ulp(Δ) + k·2⁻²⁴·Σ|terms|,

    where the second ulp is that of the coarsest type of the target and the factors.  The last term
    decides where the sum of large terms is small.
    """

    def __init__(self, step: Step, env: Env) -> None:
        super().__init__(step, env)
        self._found: dict[int, torch.Tensor] = {}
        changes = [p for p in step.parts if isinstance(p, DeltaPart)]
        self._roundings = max(1.0, len({p.adapter for p in step.parts}) / 2)
        names = {f.dtype for p in changes for f in p.spec.fields.values()}
        stored = [TORCH_DTYPES[n] for n in names if DTYPES[n].is_float and n in TORCH_DTYPES]
        self._coarsest = max(
            [self.target, *stored],
            key=lambda t: torch.finfo(t).eps,
        )

    def run(self, block: grid.Block, inputs: list[torch.Tensor], out: torch.Tensor | None) -> None:
        """Recompute the block, then measure the distance."""
        merged = inputs[-1]
        shape = (merged.shape[0], merged.shape[1])
        fresh = self.env.scratch.take("fresh", shape, self.target, self.env.device)
        super().run(block, inputs[:-1], fresh)
        bits = INTEGERS[fresh.element_size()]
        differs = fresh.view(bits) != merged.view(bits)
        count = differs.sum()
        if not bool(count):
            self._found[block.index] = torch.zeros(5, dtype=torch.float64)
            return
        expected, found = fresh[differs].double(), merged[differs].double()
        delta = expected - inputs[0][differs].double()
        distance = (found - expected).abs()
        spacing = rounding.ulp(expected, self.target)
        allowed = spacing * self._roundings + rounding.ulp(delta, self._coarsest)
        allowed += self._size(block, inputs[0])[differs]
        outside = (~(distance <= allowed)).sum()
        self._found[block.index] = torch.stack(
            [
                count.double(),
                outside.double(),
                (distance / spacing).max(),
                distance.square().sum(),
                ((found - expected) * delta).sum(),
            ]
        ).cpu()

    def _size(self, block: grid.Block, base: torch.Tensor) -> torch.Tensor:
        """A bound of what roundings to float32 of terms and partial sums may add up to."""
        wide = base.double()
        size = wide.abs()
        if self.args.method is not None:  # its steps have one order
            return size.zero_()
        for delta in self.deltas:
            delta.add_size(size, wide, block.r0, block.r1, block.c0, block.c1)
        return size.mul_(_UNIT * sum(d.roundings + 1 for d in self.deltas))

    def finish(self) -> CompareResult:  # type: ignore[override]
        """Add the blocks up, in their order."""
        sums = super().finish()
        found = [self._found[i].tolist() for i in sorted(self._found)]
        numel = self.step.view[0] * self.step.view[1]
        return CompareResult(
            self.step.output.name,
            numel,
            int(sum(f[0] for f in found)),
            int(sum(f[1] for f in found)),
            max((f[2] for f in found), default=0.0),
            sums.delta_square * numel / max(1, sums.numel),
            math.fsum(f[3] for f in found),
            math.fsum(f[4] for f in found),
        )


class CompareBytes(Kernel):
    """Two tensors that must be the same bytes."""

    def __init__(self, step: Step, env: Env) -> None:
        super().__init__(step, env)
        self._differing: dict[int, int] = {}

    def run(self, block: grid.Block, inputs: list[torch.Tensor], out: torch.Tensor | None) -> None:
        """Count differing bytes."""
        self._differing[block.index] = int((inputs[0] != inputs[1]).sum())

    def finish(self) -> CompareResult:
        """All differing bytes count as outside of any rounding."""
        count = sum(self._differing.values())
        size = self.step.view[0] * self.step.view[1]
        return CompareResult(self.step.output.name, size, count, count, 0.0, 0.0, 0.0)
