"""Statistics of an adapter that people look at before they trust it: numbers, no verdict."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from loratool.frozen import Frozen


class RiskModule(Frozen):
    """One ΔW.

    Attributes:
        name: module.
        family: last part of the module path.
        layer: number of its layer.
        norm: ‖ΔW‖_F.
        sigma_1: largest singular value.
        concentration: σ₁² / Σσ².
        entropy: of the energies σ²/Σσ², over its largest possible value ln r.
        kurtosis: of the elements; 3 for a normal distribution.
        sampled: elements that the kurtosis was computed on.
        relative_norm: ‖ΔW‖ over the mean of its family.
        intruders: with a base: how many of the ten leading directions of W + ΔW have no
            counterpart in W (largest cosine below 0.5); None without a base.
        cosines: those largest cosines, leading direction first; experts one after the other.  Of
            an intruder in a large matrix it may be an upper bound, itself below 0.5.
    """

    name: str
    family: str
    layer: int | None
    norm: float
    sigma_1: float
    concentration: float
    entropy: float
    kurtosis: float
    sampled: int
    relative_norm: float = math.nan
    intruders: int | None = None
    cosines: tuple[float, ...] = ()


class RiskFamily(Frozen):
    """Medians over the modules of one family.

    Attributes:
        spread: standard deviation of the norms over their mean.
        intruders: of all its modules.
    """

    family: str
    modules: int
    norm: float
    sigma_1: float
    concentration: float
    entropy: float
    kurtosis: float
    spread: float
    intruders: int | None


class RiskStatistics(Frozen):
    """Numbers of `inspect --risk`.

    Attributes:
        modules: every additive module.
        spread: standard deviation of ‖ΔW‖ over the mean of its family, over all modules.
        outliers: modules whose norm lies three of those deviations above their family's mean.
        embeddings: changed or replaced input embeddings and output heads.
        left_out: changes without a spectrum of their own (DoRA, PiSSA …), not in the numbers.
        base: what intruders were looked for in, None without a base.
    """

    modules: tuple[RiskModule, ...]
    spread: float
    outliers: tuple[str, ...]
    embeddings: tuple[str, ...]
    left_out: tuple[str, ...]
    base: str | None = None

    @property
    def families(self) -> tuple[RiskFamily, ...]:
        """Modules summed up by family, in order of first appearance."""
        groups: dict[str, list[RiskModule]] = {}
        for module in self.modules:
            groups.setdefault(module.family, []).append(module)
        return tuple(_family(name, members) for name, members in groups.items())


def relative_norms(modules: Sequence[tuple[str, float]]) -> list[float]:
    """Norms over the mean norm of their family; (family, norm) in, NaN where all are zero."""
    groups: dict[str, list[float]] = {}
    for family, norm in modules:
        groups.setdefault(family, []).append(norm)
    means = {family: statistics.fmean(norms) for family, norms in groups.items()}
    return [norm / means[family] if means[family] else math.nan for family, norm in modules]


def _family(name: str, members: Sequence[RiskModule]) -> RiskFamily:
    def median(key: str) -> float:
        values = [v for m in members if not math.isnan(v := getattr(m, key))]
        return statistics.median(values) if values else math.nan

    norms = [m.norm for m in members]
    mean = statistics.fmean(norms)
    counted = [m.intruders for m in members if m.intruders is not None]
    return RiskFamily(
        name, len(members), median("norm"), median("sigma_1"), median("concentration"),
        median("entropy"), median("kurtosis"),
        statistics.pstdev(norms) / mean if mean else math.nan,
        sum(counted) if counted else None,
    )  # fmt: skip
