"""Singular values of an adapter's deltas, and what they say."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from loratool.frozen import Frozen
from loratool.report.families import family_of, place_of

MOST_SIGMA = 64
"""Singular values of a module in reports of what is done with it."""


class ModuleSpectrum(Frozen):
    """One delta.

    Attributes:
        name: parameter.
        family: see `loratool.report.families`.
        layer: first number in the path, None if there is none.
        rank: of the factors.
        sigma: singular values of ΔW, descending; experts of one parameter are joined, √Σσ² each.
        norm: ‖ΔW‖_F.
        sigma_1: largest singular value.
        stable_rank: ‖ΔW‖_F² / σ₁².
        entropy_rank: exp(−Σ p ln p), p = σ / Σσ.
        rank_90: least rank that holds 90 % of the energy.
        rank_99: least rank that holds 99 % of it.
        is_finite: no NaN or infinity in the factors; without it the numbers are NaN.
    """

    name: str
    family: str
    layer: int | None
    rank: int
    sigma: tuple[float, ...]
    norm: float
    sigma_1: float
    stable_rank: float
    entropy_rank: float
    rank_90: int
    rank_99: int
    is_finite: bool = True

    @property
    def is_dead(self) -> bool:
        """It changes nothing."""
        return self.is_finite and self.norm == 0


class FamilySpectrum(Frozen):
    """Live modules of one family: medians, the norm of all, and a typical spectrum.

    Attributes:
        profile: median of σᵢ / σ₁ over the modules, for each i.
    """

    family: str
    modules: int
    norm: float
    sigma_1: float
    stable_rank: float
    entropy_rank: float
    rank: float
    rank_90: float
    rank_99: float
    profile: tuple[float, ...]


class AdapterSpectrum(Frozen):
    """All deltas that have a spectrum of their own.

    Attributes:
        modules: in file order.
        left_out: deltas without one (DoRA, bias deltas, changed bases).
    """

    modules: tuple[ModuleSpectrum, ...]
    left_out: tuple[str, ...] = ()

    @property
    def families(self) -> tuple[FamilySpectrum, ...]:
        """Summed up by family, in order of first appearance."""
        groups: dict[str, list[ModuleSpectrum]] = {}
        for module in self.modules:
            groups.setdefault(module.family, []).append(module)
        return tuple(summarize(name, members) for name, members in groups.items())

    @property
    def total(self) -> FamilySpectrum:
        """All modules as one family."""
        return summarize("total", self.modules)


def describe(name: str, rank: int, sigma: Sequence[float]) -> ModuleSpectrum:
    """The numbers of one spectrum.

    Args:
        name: parameter.
        rank: of the factors.
        sigma: descending, >= 0; NaN where the factors are not finite.
    """
    family, layer, nan = family_of(name), place_of(name).layer, math.nan
    if not all(map(math.isfinite, sigma)):
        return ModuleSpectrum(name, family, layer, rank, (), nan, nan, nan, nan, 0, 0, False)
    top = max(sigma, default=0.0)
    if top == 0:
        return ModuleSpectrum(name, family, layer, rank, tuple(sigma), 0.0, 0.0, 0.0, 0.0, 0, 0)
    scaled = [s / top for s in sigma]  # squares of very small values would vanish
    square, total = math.fsum(s * s for s in scaled), math.fsum(scaled)
    entropy = -math.fsum(s / total * math.log(s / total) for s in scaled if s > 0)
    return ModuleSpectrum(
        name, family, layer, rank, tuple(sigma), math.sqrt(square) * top, top, square,
        math.exp(entropy), _least_rank(scaled, 0.9), _least_rank(scaled, 0.99),
    )  # fmt: skip


def summarize(name: str, modules: Iterable[ModuleSpectrum]) -> FamilySpectrum:
    """Medians over the live modules of a family."""
    members = list(modules)
    live = [m for m in members if m.is_finite and not m.is_dead]
    if not live:
        return FamilySpectrum(name, len(members), 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, ())

    def median(attribute: str) -> float:
        return float(statistics.median(getattr(m, attribute) for m in live))

    longest = max(len(m.sigma) for m in live)
    profile = tuple(
        statistics.median(m.sigma[i] / m.sigma_1 if i < len(m.sigma) else 0.0 for m in live)
        for i in range(longest)
    )
    return FamilySpectrum(
        name, len(members), math.sqrt(math.fsum(m.norm**2 for m in live)),
        max(m.sigma_1 for m in live), median("stable_rank"), median("entropy_rank"),
        median("rank"), median("rank_90"), median("rank_99"), profile,
    )  # fmt: skip


def _least_rank(sigma: Sequence[float], energy: float) -> int:
    """Smallest k whose tail holds at most 1 − energy; thresholds as in `linalg.rank`."""
    allowed = (1 - energy) * math.fsum(s * s for s in sigma) * (1 + 2.0**-40)
    tail, rank = 0.0, len(sigma)
    while rank and tail + sigma[rank - 1] ** 2 <= allowed:
        rank -= 1
        tail += sigma[rank] ** 2
    return rank
