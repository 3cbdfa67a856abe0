"""Two or more adapters side by side, module by module, from their factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from loratool.adapter import DeltaSpec
from loratool.delta.lowrank import Pair
from loratool.engine.factors import load_pairs, load_vector
from loratool.engine.grid import SAMPLE_ELEMENTS
from loratool.engine.kernel import Env
from loratool.frozen import Frozen
from loratool.linalg.subspaces import (
    DIRECTIONS,
    Spectral,
    difference_norm,
    inner_product,
    principal_angles,
    spectral,
    subspace_similarity,
)

TOP_SHARE = 0.2  # of the largest elements, whose overlap is counted (the density of TIES)
MAX_DIRECTIONS = DIRECTIONS  # φ is kept for this many leading directions


class Signs(Frozen):
    """What only single elements tell; counts over the elements looked at.

    Attributes:
        seen: elements looked at.
        total: elements of the module.
        both: elements where neither change is zero.
        opposite: of those, with opposite signs.
        top: elements among the largest `TOP_SHARE` of the first adapter.
        shared_top: of those, also among the largest of the second.
    """

    seen: int
    total: int
    both: int
    opposite: int
    top: int
    shared_top: int


class PairResult(Frozen):
    """Two adapters' changes of one module (sums over experts).

    Attributes:
        inner: ⟨ΔW₁, ΔW₂⟩.
        square_one: ‖ΔW₁‖².
        square_two: ‖ΔW₂‖².
        difference: ‖ΔW₁ − ΔW₂‖².
        phi_A: φ(i, j) of the input sides, means over experts; None for a bias.
        phi_B: φ(i, j) of the output sides.
        angles_A: principal angles of the input sides in radians, of the first expert.
        angles_B: principal angles of the output sides.
        sides: (out, in) of one matrix.
        signs: element counts.
    """

    inner: float
    square_one: float
    square_two: float
    difference: float
    phi_A: torch.Tensor | None
    phi_B: torch.Tensor | None
    angles_A: torch.Tensor
    angles_B: torch.Tensor
    sides: tuple[int, int]
    signs: Signs


def scaled_pairs(spec: DeltaSpec, env: Env) -> list[Pair]:
    """lora_B with the scaling folded in, and lora_A."""
    return [(lora_B * spec.scaling, lora_A) for lora_B, lora_A in load_pairs(spec, env)]


def compare_module(one: DeltaSpec, two: DeltaSpec, env: Env) -> PairResult:
    """Everything about one module that both adapters change."""
    if not one.is_matrix:
        return _compare_vectors(one, two, env)
    pairs = list(zip(scaled_pairs(one, env), scaled_pairs(two, env), strict=True))
    spectra = [(spectral(*p), spectral(*q)) for p, q in pairs]
    phi_A = [subspace_similarity(_top(p.V), _top(q.V)) for p, q in spectra]
    phi_B = [subspace_similarity(_top(p.U), _top(q.U)) for p, q in spectra]
    first, second = spectra[0]
    lora_B, lora_A = pairs[0][0]
    return PairResult(
        inner=sum(inner_product(p, q) for p, q in spectra),
        square_one=sum(p.square for p, _ in spectra),
        square_two=sum(q.square for _, q in spectra),
        difference=sum(difference_norm(p, q) ** 2 for p, q in pairs),
        phi_A=_mean(phi_A),
        phi_B=_mean(phi_B),
        angles_A=principal_angles(first.spans[1], second.spans[1]),
        angles_B=principal_angles(first.spans[0], second.spans[0]),
        sides=(lora_B.shape[0], lora_A.shape[1]),
        signs=_count_signs(pairs),
    )


def gram(specs: Mapping[int, DeltaSpec], env: Env) -> dict[tuple[int, int], float]:
    """⟨ΔW_s, ΔW_t⟩ of one module for all adapters that have it, s <= t."""
    numbers = sorted(specs)
    if not specs[numbers[0]].is_matrix:
        vectors = {n: load_vector(specs[n], env) * specs[n].scaling for n in numbers}
        return {(s, t): float(vectors[s] @ vectors[t]) for s in numbers for t in numbers if s <= t}
    spectra: dict[int, list[Spectral]] = {
        n: [spectral(*p) for p in scaled_pairs(specs[n], env)] for n in numbers
    }
    return {
        (s, t): sum(inner_product(p, q) for p, q in zip(spectra[s], spectra[t], strict=True))
        for s in numbers
        for t in numbers
        if s <= t
    }


def _top(basis: torch.Tensor) -> torch.Tensor:
    return basis[:, :MAX_DIRECTIONS]


def _mean(tables: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean over experts, on the directions that all of them have."""
    rows, cols = (min(t.shape[axis] for t in tables) for axis in (0, 1))
    return torch.stack([t[:rows, :cols] for t in tables]).mean(0)


def _count_signs(pairs: Sequence[tuple[Pair, Pair]]) -> Signs:
    """Count in whole rows that lie evenly over the matrix; the same rows for both."""
    (first_B, first_A), _ = pairs[0]
    rows, cols = first_B.shape[0], first_A.shape[1]
    share = max(1, SAMPLE_ELEMENTS // len(pairs))
    count = min(rows, max(1, share // cols))
    index = torch.arange(count) * rows // count
    found = [
        _signs_of(one_B[index] @ one_A, two_B[index] @ two_A)
        for (one_B, one_A), (two_B, two_A) in pairs
    ]
    seen, both, opposite, top, shared = (sum(column) for column in zip(*found, strict=True))
    return Signs(seen, rows * cols * len(pairs), both, opposite, top, shared)


def _signs_of(one: torch.Tensor, two: torch.Tensor) -> tuple[int, int, int, int, int]:
    both = (one != 0) & (two != 0)
    opposite = both & ((one > 0) != (two > 0))
    k = max(1, round(TOP_SHARE * one.numel()))
    tops = [torch.zeros(t.numel(), dtype=torch.bool).scatter_(
                0, t.abs().flatten().topk(k).indices, True) for t in (one, two)]  # fmt: skip
    return one.numel(), int(both.sum()), int(opposite.sum()), k, int((tops[0] & tops[1]).sum())


def _compare_vectors(one: DeltaSpec, two: DeltaSpec, env: Env) -> PairResult:
    first = load_vector(one, env) * one.scaling
    second = load_vector(two, env) * two.scaling
    seen, both, opposite, top, shared = _signs_of(first, second)
    nothing = torch.zeros(0, dtype=torch.float64)
    return PairResult(
        float(first @ second), float(first @ first), float(second @ second),
        float((first - second).square().sum()), None, None, nothing, nothing,
        (len(first), 1), Signs(seen, seen, both, opposite, top, shared),
    )  # fmt: skip


class MeanTable:
    """Mean of φ tables of different sizes: each entry over the modules that have it."""

    def __init__(self) -> None:
        self._sum = torch.zeros(MAX_DIRECTIONS, MAX_DIRECTIONS, dtype=torch.float64)
        self._count = torch.zeros_like(self._sum)

    def add(self, table: torch.Tensor | None) -> None:
        """Take one module's table in."""
        if table is not None and table.numel():
            rows, cols = table.shape
            self._sum[:rows, :cols] += table
            self._count[:rows, :cols] += 1

    def table(self) -> list[list[float]]:
        """The mean, as far as any module reaches."""
        rows, cols = int((self._count[:, 0] > 0).sum()), int((self._count[0] > 0).sum())
        mean = self._sum[:rows, :cols] / self._count[:rows, :cols]
        return [list(map(float, row)) for row in mean]  # 0/0 = NaN where no module reaches
