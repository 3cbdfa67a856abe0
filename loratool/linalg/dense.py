"""Element-wise methods at work: selectors and a combination, block by block or all at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from loratool.frozen import replace
from loratool.linalg.elect import Noise
from loratool.linalg.select import Chance, Largest, Middle, Place, Selector, count_kept
from loratool.methods import Method, find_method
from loratool.plugins import function_of

_TILE_ELEMENTS = 1 << 19  # of all adapters together, combined at a time: they stay in the cache

Combine = Callable[..., torch.Tensor]


class DenseCombiner:
    """One element-wise method on one stack of T matrices of the same shape.

    Passes over all blocks come first (`see`, `end_pass`, until `wants_pass` is false), then
    `combine` in any order.  Memory beyond the blocks: 2^16 counters per adapter.

    Args:
        method: a row whose function takes (values (T, m, n), weights (T,)).
        params: of the method.
        weights: of the adapters.
        total: elements of one matrix.
        keys: a 64-bit key per adapter, for random choices.
    """

    def __init__(
        self,
        method: Method,
        params: Mapping[str, Any],
        weights: Sequence[float],
        total: int,
        keys: Sequence[int],
    ) -> None:
        self.method = method
        self.weights = tuple(weights)
        self._function: Combine = function_of(method.function)
        self._params = dict(params)
        density = float(params.get("density", 1.0))
        count = count_kept(density, total)
        if method.rounds_down or method.space == "factor":
            count = int(density * total)  # down to none
        self._selectors: list[Selector] = []
        self._shared: Largest | None = None
        self._energies: torch.Tensor | None = None
        self._blocks: dict[int, list[float]] = {}
        if method.select == "variance":
            self._shared = Largest(count, total)
            self._energies = torch.zeros(len(weights), dtype=torch.float64)
        elif method.select == "largest":
            self._selectors = [Largest(count, total) for _ in weights]
        elif method.select == "middle":
            top = int(float(params["gamma"]) * total)
            self._selectors = [Middle(top, count, total) for _ in weights]
        elif method.select in ("random", "ranked"):
            epsilon = float(params.get("epsilon", 0.0))
            self._selectors = [Chance(density, epsilon, key) for key in keys]
        self._measured = self._energies is None

    @property
    def needs_rows(self) -> bool:
        """Blocks must hold whole rows of the matrix."""
        return self.method.select == "ranked"

    @property
    def wants_pass(self) -> bool:
        """True while blocks must be seen."""
        if self._shared is not None:
            return self._shared.wants_pass or not self._measured
        return any(s.wants_pass for s in self._selectors)

    @property
    def sees_together(self) -> bool:
        """`see` needs all matrices at once, not one after the other."""
        return self._shared is not None

    def see(self, place: Place, values: torch.Tensor | Iterable[torch.Tensor]) -> None:
        """One block of a pass; from any thread.

        Args:
            place: where it lies.
            values: (T, m, n) float32 or float64, unweighted; or one (m, n) after the other.
        """
        if self._shared is not None:
            assert isinstance(values, torch.Tensor)
            if self._shared.wants_pass:
                self._shared.see(place, self._variance(values))
            else:
                kept = self._weighted(values) * self._shared.mask(place, self._variance(values))
                self._blocks[place.index] = kept.double().square().sum((1, 2)).tolist()
            return
        for one, value in zip(self._selectors, values, strict=True):
            if one.wants_pass:
                one.see(place, value)

    def end_pass(self) -> None:
        """After the last block of a pass."""
        if self._shared is not None:
            if self._shared.wants_pass:
                self._shared.end_pass()
                return
            rows = [self._blocks[i] for i in sorted(self._blocks)]
            sums = [math.fsum(column) for column in zip(*rows, strict=True)]
            self._energies = torch.tensor(sums, dtype=torch.float64)
            self._measured = True
            return
        for one in self._selectors:
            if one.wants_pass:
                one.end_pass()

    def combine(self, place: Place, values: torch.Tensor, noise: Noise = 0.0) -> torch.Tensor:
        """The combined block (m, n); ``values`` as in `see`, ``noise`` as in `elect`."""
        count, rows, cols = values.shape
        selectors = self._selectors if self._shared is None else [self._shared]
        height = rows
        if values.device.type == "cpu" and not any(s.counts_ties for s in selectors):
            height = max(1, _TILE_ELEMENTS // (count * cols))
        whole = values.new_empty(rows, cols)
        for r0 in range(0, rows, height):
            at = slice(r0, min(r0 + height, rows))
            level = noise[at] if isinstance(noise, torch.Tensor) and len(noise) > 1 else noise
            whole[at] = self._combine(replace(place, r0=place.r0 + r0), values[:, at], level)
        return whole

    def _combine(self, place: Place, values: torch.Tensor, noise: Noise) -> torch.Tensor:
        """Some rows of a block."""
        weights = torch.tensor(self.weights, dtype=values.dtype)
        params: dict[str, Any] = dict(self._params)
        if self._shared is not None:
            assert self._energies is not None
            values = values * self._shared.mask(place, self._variance(values))
            params["energies"] = self._energies
        elif self._selectors:
            pairs = zip(self._selectors, values, strict=True)
            values = torch.stack([s.apply(place, v) for s, v in pairs])
        return self._function(values, weights, noise=noise, **params)

    def _weighted(self, values: torch.Tensor) -> torch.Tensor:
        weights = torch.tensor(self.weights, dtype=values.dtype, device=values.device)
        return values * weights[:, None, None]

    def _variance(self, values: torch.Tensor) -> torch.Tensor:
        """Between the adapters; of a module that one of them has alone, against no change."""
        weighted = self._weighted(values)
        return weighted[0].square() if len(weighted) == 1 else weighted.var(0, correction=0)


def combine_rows(
    combiner: DenseCombiner,
    shape: tuple[int, int],
    make: Callable[[int, int], torch.Tensor],
    *,
    height: int,
    offset: int = 0,
    noise: torch.Tensor | None = None,
) -> torch.Tensor:
    """An element-wise method on matrices that are made a block of rows at a time.

    Args:
        combiner: fresh.
        shape: (m, n) of the matrices.
        make: (first row, end) -> their (T, rows, n), the same every time.
        height: rows per block.
        offset: position of these matrices in a longer stack, for random choices.
        noise: (m, 1), size of a value that means nothing, row by row; None = every value counts.

    Returns:
        (m, n).  Beside it T blocks are in memory, whatever m is.
    """
    rows, cols = shape
    starts = range(0, rows, height)

    def block(index: int, r0: int) -> tuple[Place, torch.Tensor]:
        values = make(r0, min(r0 + height, rows))
        if noise is not None:
            values = values * (values.abs() > noise[r0 : r0 + height])
        return Place(index, r0=r0, cols=cols, offset=offset), values

    while combiner.wants_pass:
        for index, r0 in enumerate(starts):
            combiner.see(*block(index, r0))
        combiner.end_pass()
    whole: torch.Tensor | None = None
    for index, r0 in enumerate(starts):
        level = 0.0 if noise is None else noise[r0 : r0 + height]
        part = combiner.combine(*block(index, r0), level)
        whole = part.new_empty(shape) if whole is None else whole
        whole[r0 : r0 + height] = part
    assert whole is not None
    return whole


def combine_whole(
    values: torch.Tensor,
    method: Method | str,
    params: Mapping[str, Any],
    weights: Sequence[float],
    keys: Sequence[int],
    *,
    offset: int = 0,
    noise: float = 0.0,
) -> torch.Tensor:
    """An element-wise method on matrices that fit into memory.

    Args:
        values: (T, m, n) float32 or float64.
        method: a row or its name; ``sum`` adds.
        params: of the method.
        weights: of the adapters.
        keys: as in `DenseCombiner`.
        offset: position of these matrices in a longer stack, for random choices.
        noise: size of a value that means nothing.
    """
    if method == "sum":
        method = find_method("magnitude")
        params = {"density": 1.0}
    row = find_method(method) if isinstance(method, str) else method
    rows, cols = values.shape[1:]
    combiner = DenseCombiner(row, params, weights, rows * cols, keys)
    level = values.new_full((rows, 1), noise) if noise else None
    return combine_rows(
        combiner, (rows, cols), lambda r0, r1: values[:, r0:r1], height=rows, offset=offset,
        noise=level,
    )  # fmt: skip
