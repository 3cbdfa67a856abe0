"""Element-wise methods at work: selectors and a combination, block by block or all at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch

from loratool.linalg.select import Chance, Largest, Middle, Place, Selector, count_kept
from loratool.methods import Method, find_method

Combine = Callable[..., torch.Tensor]


def resolve(function: str) -> Combine:
    """The function that a registry row names."""
    module, _, name = function.partition(":")
    made: Combine = getattr(import_module(module), name)
    return made


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
        self._function = resolve(method.function)
        self._params = {k: v for k, v in params.items() if isinstance(v, (int, float))}
        density = float(params.get("density", 1.0))
        count = count_kept(density, total)
        if "peft" in method.name or method.space == "factor":
            count = int(density * total)  # as PEFT rounds, down to none
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

    def see(self, place: Place, values: torch.Tensor) -> None:
        """One block of a pass.

        Args:
            place: where it lies.
            values: (T, m, n) float32 or float64, unweighted.
        """
        if self._shared is not None:
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

    def combine(self, place: Place, values: torch.Tensor) -> torch.Tensor:
        """The combined block (m, n); ``values`` as in `see`."""
        weights = torch.tensor(self.weights, dtype=values.dtype)
        params: dict[str, Any] = dict(self._params)
        if self._shared is not None:
            assert self._energies is not None
            values = values * self._shared.mask(place, self._variance(values))
            params["energies"] = self._energies
        elif self._selectors:
            pairs = zip(self._selectors, values, strict=True)
            values = torch.stack([s.apply(place, v) for s, v in pairs])
        return self._function(values, weights, **params)

    def _weighted(self, values: torch.Tensor) -> torch.Tensor:
        weights = torch.tensor(self.weights, dtype=values.dtype, device=values.device)
        return values * weights[:, None, None]

    def _variance(self, values: torch.Tensor) -> torch.Tensor:
        """Between the adapters; of a module that one of them has alone, against no change."""
        weighted = self._weighted(values)
        return weighted[0].square() if len(weighted) == 1 else weighted.var(0, correction=0)


def combine_whole(
    values: torch.Tensor,
    method: Method | str,
    params: Mapping[str, Any],
    weights: Sequence[float],
    keys: Sequence[int],
    *,
    offset: int = 0,
) -> torch.Tensor:
    """An element-wise method on matrices that fit into memory.

    Args:
        values: (T, m, n) float32 or float64.
        method: a row or its name; ``sum`` adds.
        params: of the method.
        weights: of the adapters.
        keys: as in `DenseCombiner`.
        offset: position of these matrices in a longer stack, for random choices.
    """
    if method == "sum":
        method = find_method("magnitude")
        params = {"density": 1.0}
    row = find_method(method) if isinstance(method, str) else method
    combiner = DenseCombiner(row, params, weights, values[0].numel(), keys)
    place = Place(0, cols=values.shape[2], offset=offset)
    while combiner.wants_pass:
        combiner.see(place, values)
        combiner.end_pass()
    return combiner.combine(place, values)
