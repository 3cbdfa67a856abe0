"""An adapter beside its base: size, amplification, and what a merge would swallow."""

from __future__ import annotations

import math
import zlib

import torch

from loratool.delta.base import Delta
from loratool.delta.lowrank import LowRank
from loratool.delta.placed import Placed
from loratool.engine import grid
from loratool.engine.buffers import TORCH_DTYPES
from loratool.engine.kernel import Env
from loratool.engine.merging import AddDeltas
from loratool.errors import NumericError
from loratool.frozen import Frozen
from loratool.linalg.noise import Grid, resolvable, simulate_noise
from loratool.linalg.product import factor_product
from loratool.linalg.rounding import rounded
from loratool.plan import DeltaPart, Step

FORMATS = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp8": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
"""Word in reports -> type that a merge would round to."""

_WHOLE = 1 << 20  # elements of a tensor that are all rounded; of larger ones about every 17th is
_STRIDES = (17, 19, 23, 29, 31)


class Look(Frozen):
    """One delta on one tensor, as sums over the elements that it covers.

    Attributes:
        name: parameter of the adapter.
        dtype: of the base tensor.
        numel: elements covered.
        weight_square: ΣW².
        delta_square: ΣΔ².
        core_square: ‖Uᵀ W V‖_F²; None for a change that is no product of two factors.
        noise_top: largest singular value of the rounding noise, simulated; None likewise.
        noise_rank: singular values of Δ that a merge resolves beside it; None likewise.
        errors: format -> Σ(rounding error)² of a merge into it; infinite if it overflows.
        changed: format -> number of elements that change.
    """

    name: str
    dtype: str
    numel: int
    weight_square: float
    delta_square: float
    core_square: float | None
    noise_top: float | None
    noise_rank: int | None
    errors: dict[str, float]
    changed: dict[str, float]


class LookAtBase(AddDeltas):
    """Looks at every delta of a tensor apart; W passes block by block and is never held."""

    def __init__(self, step: Step, env: Env) -> None:
        super().__init__(step, env)
        self.dtype = torch.float64
        self._views: list[_View] = []

    def prepare(self) -> None:
        """Load the factors, decompose their products, measure norms where a delta asks for it."""
        parts = [p for p in self.step.parts if isinstance(p, DeltaPart)]
        self.deltas = [self._build(part) for part in parts]
        self.measure_norms()
        self._views = [_View(p, d, self) for p, d in zip(parts, self.deltas, strict=True)]

    def run(self, block: grid.Block, inputs: list[torch.Tensor], out: torch.Tensor | None) -> None:
        """Add the block's sums to each delta's."""
        weight = inputs[0].to(torch.float64)
        for view in self._views:
            view.take(block, weight)

    def finish(self) -> list[Look]:  # type: ignore[override]
        """One `Look` per delta.

        Raises:
            NumericError: the base holds NaN or infinity where a delta goes.
        """
        return [view.finish() for view in self._views]


class _View:
    """One delta's sums, kept per block and added in the order of the blocks."""

    def __init__(self, part: DeltaPart, delta: Delta, kernel: LookAtBase) -> None:
        self.placed = delta if isinstance(delta, Placed) else None
        self.name, self.delta = part.spec.name, delta if self.placed is None else self.placed.inner
        self.step, self.own = kernel.step, TORCH_DTYPES[kernel.step.output.dtype]
        self.sums: dict[int, _Sums] = {}
        self.kinds = dict(FORMATS)
        if self.own == torch.float32:
            self.kinds["float32"] = torch.float32
        self.factors: LowRank | None = None
        if isinstance(self.delta, LowRank):
            self.factors = only = self.delta
            found = factor_product(only.left * only.coefficient, only.right)
            self.sigma = found.S
            live = int((found.S[:1] * 2.0**-40 < found.S).sum()) if len(found.S) else 0
            self.U, self.Vh = found.vectors(live)
            self.grid = Grid(only.shape, self.own, only.left.device)

    def take(self, block: grid.Block, weight: torch.Tensor) -> None:
        place = (block.r0, block.r1, block.c0, block.c1)
        if self.placed is not None:
            cut = self.placed.within(weight, *place)
            if cut is None:
                return
            weight, place = cut
        change = torch.zeros_like(weight)
        self.delta.add_to(change, weight, *place)
        sums = _Sums(weight.numel(), _square(weight), _square(change))
        if self.factors is not None:
            r0, r1, c0, c1 = place
            sums.core = self.U[r0:r1].T @ (weight @ self.Vh[:, c0:c1].T)  # (r, r)
            self.grid.take((weight + change).to(self.own), r0, c0)
        stride = 1
        if self.step.output.numel > _WHOLE:  # no divisor of a row: all columns have their share
            stride = next(s for s in _STRIDES if weight.shape[1] % s)
        self._round(weight.flatten()[::stride], change.flatten()[::stride], sums)
        self.sums[block.index] = sums

    def _round(self, weight: torch.Tensor, change: torch.Tensor, sums: _Sums) -> None:
        """Merge a sample of the block into every format."""
        sums.picked, sums.picked_square = len(weight), _square(change)
        for word, kind in self.kinds.items():
            held = weight if kind == self.own else rounded(weight, kind)
            merged = rounded(held + change, kind)
            lost = (merged - held).sub_(change)  # not by the sum, in which small changes drown
            error = _square(lost) if bool(merged.isfinite().all()) else math.inf
            sums.merged[word] = (error, int((merged != held).sum()))

    def finish(self) -> Look:
        ordered = [self.sums[i] for i in sorted(self.sums)]
        weight = math.fsum(s.weight_square for s in ordered)
        delta = math.fsum(s.delta_square for s in ordered)
        if not math.isfinite(weight) or not math.isfinite(delta):
            raise NumericError(
                "LT-806", "the base holds NaN or infinity where the adapter goes",
                file=getattr(self.step.inputs[0], "file", None), key=self.step.output.name,
                expected="finite values",
            )  # fmt: skip
        core_square = top = rank = None
        if self.factors is not None:
            core = sum((s.core for s in ordered), torch.zeros(()))
            core_square = float(core.square().sum())
            top = self._noise_top(delta)
            rank = int((self.sigma > resolvable(top, self.factors.shape)).sum())
        numel = sum(s.numel for s in ordered)
        picked = math.fsum(s.picked_square for s in ordered)
        larger = delta / picked if picked else 1.0
        wider = numel / max(1, sum(s.picked for s in ordered))
        return Look(
            self.name, self.step.output.dtype, numel, weight, delta, core_square, top, rank,
            {w: math.fsum(s.merged[w][0] for s in ordered) * larger for w in self.kinds},
            {w: sum(s.merged[w][1] for s in ordered) * wider for w in self.kinds},
        )  # fmt: skip

    def _noise_top(self, delta_square: float) -> float:
        """As `extract --rank auto` simulates it for the merged tensor."""
        (floor,) = simulate_noise(
            self.grid.exponents[None], [self.grid.significand_bits],
            delta_squares=[delta_square], seeds=[zlib.crc32(self.name.encode())],
        )  # fmt: skip
        del self.grid
        return floor.top


class _Sums:
    """What one block adds."""

    def __init__(self, numel: int, weight_square: float, delta_square: float) -> None:
        self.numel, self.weight_square, self.delta_square = numel, weight_square, delta_square
        self.core = torch.zeros(())
        self.picked, self.picked_square = 0, 0.0
        self.merged: dict[str, tuple[float, int]] = {}


def _square(values: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(values)) ** 2
