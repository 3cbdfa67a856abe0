"""An adapter beside its base: size, amplification, and what a merge would swallow."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from loratool.delta.base import Delta
from loratool.delta.lowrank import LowRank
from loratool.delta.placed import Placed
from loratool.engine import grid
from loratool.engine.kernel import Env
from loratool.engine.merging import AddDeltas
from loratool.linalg import rounding
from loratool.linalg.product import factor_product
from loratool.plan import DeltaPart, Step

FORMATS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "fp8": torch.float8_e4m3fn}
"""Word in reports -> type whose spacing a merge would round to."""

_SAMPLE = 8192  # elements of a block that the rounding forecast looks at


@dataclass(frozen=True)
class Look:
    """One delta on one tensor, as sums over the elements that it covers.

    Attributes:
        name: parameter of the adapter.
        dtype: of the base tensor.
        numel: elements covered.
        weight_square: ΣW².
        delta_square: ΣΔ².
        core_square: ‖Uᵀ W V‖_F²; None for a change that is no product of two factors.
        sigma: singular values of Δ, descending; None likewise.
        noise_top: largest singular value of the rounding noise; None likewise.
        errors: format -> expected Σ(rounding error)² of a merge into it.
        changed: format -> expected number of elements that change.
    """

    name: str
    dtype: str
    numel: int
    weight_square: float
    delta_square: float
    core_square: float | None
    sigma: tuple[float, ...] | None
    noise_top: float | None
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
        built = [self._build(part) for part in parts]
        self.deltas = [delta for made in built for delta in made]
        self.measure_norms()
        self._views = [_View(p, d, self) for p, d in zip(parts, built, strict=True)]

    def run(self, block: grid.Block, inputs: list[torch.Tensor], out: torch.Tensor | None) -> None:
        """Add the block's sums to each delta's."""
        weight = inputs[0].to(torch.float64)
        for view in self._views:
            view.take(block, weight)

    def finish(self) -> list[Look]:  # type: ignore[override]
        """One `Look` per delta."""
        return [view.finish() for view in self._views]


class _View:
    """One delta's sums, kept per block and added in the order of the blocks."""

    def __init__(self, part: DeltaPart, deltas: list[Delta], kernel: LookAtBase) -> None:
        self.name, self.deltas = part.spec.name, deltas
        self.dtype, self.target = kernel.step.output.dtype, kernel.target
        self.sums: dict[int, _Sums] = {}
        only = deltas[0]
        self.placed = only if isinstance(only, Placed) else None
        inner = only.inner if isinstance(only, Placed) else only
        self.shape = inner.shape
        self.factors: LowRank | None = None
        if len(deltas) == 1 and isinstance(inner, LowRank):
            self.factors = inner
            found = factor_product(inner.left * inner.coefficient, inner.right)
            self.sigma = found.S
            live = int((found.S[:1] * 2.0**-40 < found.S).sum()) if len(found.S) else 0
            self.U, self.Vh = found.vectors(live)
            gram = inner.right @ inner.right.T  # (r, r)
            left = inner.left * inner.coefficient
            self.row_square = ((left @ gram) * left).sum(1).clamp_min(0) / self.shape[1]
            self.spread = math.sqrt(12 * float(found.S.square().sum()) / math.prod(self.shape))

    def take(self, block: grid.Block, weight: torch.Tensor) -> None:
        place = (block.r0, block.r1, block.c0, block.c1)
        inside = weight
        if self.placed is not None:
            cut = self.placed.within(weight, *place)
            if cut is None:
                return
            inside, place = cut
        r0, r1, c0, c1 = place
        sums = _Sums(inside.numel(), float(inside.square().sum()))
        if self.factors is not None:
            mean_square = self.row_square[r0:r1]
            sums.delta_square = float(mean_square.sum()) * (c1 - c0)
            sums.core = self.U[r0:r1].T @ (inside @ self.Vh[:, c0:c1].T)  # (r, r)
            noise = rounding.ulp(inside, self.target).clamp_max(self.spread).square() / 12
            sums.rows, sums.cols, sums.place = noise.sum(1), noise.sum(0), place
        else:
            change = torch.zeros_like(weight)
            for delta in self.deltas:
                delta.add_to(change, weight, block.r0, block.r1, block.c0, block.c1)
            if self.placed is not None:
                found = self.placed.within(change, block.r0, block.r1, block.c0, block.c1)
                assert found is not None
                change = found[0]
            mean_square = change.square().mean(1)
            sums.delta_square = float(change.square().sum())
        self._forecast(inside, mean_square, sums)
        self.sums[block.index] = sums

    def _forecast(self, inside: torch.Tensor, mean_square: torch.Tensor, sums: _Sums) -> None:
        values = inside[:, :: max(1, inside.numel() // _SAMPLE)]
        sigma = mean_square.sqrt()[:, None].expand_as(values)
        kinds = dict(FORMATS)
        if self.dtype == "F32":
            kinds["float32"] = torch.float32
        for word, kind in kinds.items():
            held = values if kind == torch.float8_e4m3fn else values.to(kind).double()
            error, share = rounding.expected_rounding(held, sigma, kind)
            sums.forecast[word] = (error * inside.numel(), share * inside.numel())

    def finish(self) -> Look:
        ordered = [self.sums[i] for i in sorted(self.sums)]
        words = ordered[0].forecast if ordered else {}
        core_square = sigma = top = None
        if self.factors is not None:
            core = sum((s.core for s in ordered), torch.zeros(()))
            core_square = float(core.square().sum())
            sigma = tuple(self.sigma.tolist())
            top = self._noise_top(ordered)
        return Look(
            self.name, self.dtype, sum(s.numel for s in ordered),
            math.fsum(s.weight_square for s in ordered),
            math.fsum(s.delta_square for s in ordered), core_square, sigma, top,
            {w: math.fsum(s.forecast[w][0] for s in ordered) for w in words},
            {w: math.fsum(s.forecast[w][1] for s in ordered) for w in words},
        )  # fmt: skip

    def _noise_top(self, ordered: list[_Sums]) -> float:
        """Largest singular value of independent noise: its longest row plus its longest column.

        Exact in the limit where all variances are equal, σ(√m + √n), an upper bound where they
        are not (Bandeira & van Handel 2016), and it needs W only once.
        """
        rows = torch.zeros(self.shape[0], dtype=torch.float64, device=self.U.device)
        cols = torch.zeros(self.shape[1], dtype=torch.float64, device=self.U.device)
        for one in ordered:
            r0, r1, c0, c1 = one.place
            rows[r0:r1] += one.rows
            cols[c0:c1] += one.cols
        return float(rows.max().sqrt() + cols.max().sqrt()) if len(ordered) else 0.0


class _Sums:
    """What one block adds."""

    def __init__(self, numel: int, weight_square: float) -> None:
        self.numel, self.weight_square, self.delta_square = numel, weight_square, 0.0
        self.core = self.rows = self.cols = torch.zeros(())
        self.place = (0, 0, 0, 0)
        self.forecast: dict[str, tuple[float, float]] = {}
