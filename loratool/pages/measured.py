"""Sections of `inspect`: spectra, the adapter beside its base, statistics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import takewhile

from loratool.pages.blocks import (
    Block,
    Cell,
    Chart,
    Curve,
    Section,
    Spark,
    Table,
    number,
    share,
)
from loratool.pages.heat import heat_of, median
from loratool.report.look import AdapterLook, ModuleLook
from loratool.report.risk import RiskStatistics
from loratool.report.spectrum import AdapterSpectrum, FamilySpectrum, ModuleSpectrum

_CURVES, _POINTS = 8, 24
_SPECTRUM_HEAD = ("rank", "‖ΔW‖", "σ₁", "stable rank", "entropy rank", "90 %", "99 %")


def spectrum_section(found: AdapterSpectrum) -> Section:
    """Curves of the strongest families, heat maps, families, modules."""
    groups = found.families
    maps = [
        heat_of("‖ΔW‖ by layer", ((m.name, m.norm) for m in found.modules)),
        heat_of("Rank that holds 99 % of the energy, median",
                ((m.name, float(m.rank_99)) for m in found.modules), ".3g", reduce=median),
    ]  # fmt: skip
    families: list[Sequence[Cell]] = [
        (f.family, number(f.modules, ",d"), *_spectrum_cells(f), Spark(f.profile, ""))
        for f in groups
    ]  # fmt: skip
    modules: list[Sequence[Cell]] = [(m.name, *_spectrum_cells(m), spark(m)) for m in found.modules]
    blocks: list[Block] = [*curves(found), *(h for h in maps if h is not None)]
    if len(families) < len(modules):
        blocks.append(Table("By family: medians, and the norm of all", ("family", "modules",
                            *_SPECTRUM_HEAD, "σᵢ / σ₁"), families))  # fmt: skip
    blocks.append(Table("By module", ("module", *_SPECTRUM_HEAD, "σᵢ / σ₁"), modules))
    return Section("Singular values of ΔW", blocks)


def curves(found: AdapterSpectrum) -> Iterator[Chart]:
    """The typical spectra of the strongest families, if there is any."""
    strong = sorted(found.families, key=lambda f: -f.norm)[:_CURVES]
    drawn = [Curve(f.family, tuple(takewhile(bool, f.profile))) for f in strong if f.norm > 0]
    if drawn:
        lines = [c for c in drawn if len(c.heights) > 1]  # one value is always 1
        yield Chart("Typical spectrum: σᵢ / σ₁, median over modules", "i", lines or drawn)


def _spectrum_cells(one: ModuleSpectrum | FamilySpectrum) -> list[Cell]:
    return [number(one.rank, ",.4g"), number(one.norm), number(one.sigma_1),
            number(one.stable_rank, ".3g"), number(one.entropy_rank, ".3g"),
            number(one.rank_90, ".3g"), number(one.rank_99, ".3g")]  # fmt: skip


def spark(module: ModuleSpectrum) -> Cell:
    """A spectrum within a line."""
    if module.is_dead or not module.is_finite:
        return "no change" if module.is_dead else "not finite"
    top = module.sigma_1
    heights = [s / top for s in module.sigma]
    if len(heights) > _POINTS:  # evenly spread, both ends kept
        heights = [heights[round(i * (len(heights) - 1) / (_POINTS - 1))] for i in range(_POINTS)]
    return Spark(tuple(heights), "")


def look_section(found: AdapterLook) -> Section:
    """How strong beside the base, and what a merge would swallow."""
    formats = [word for word in found.total.swallowed if word != found.total.dtype]
    head = ("type", "rank", "above noise", "ρ = ‖ΔW‖/‖W‖", "amplified", "swallowed",
            *(f"swallowed by {word}" for word in formats))  # fmt: skip
    maps = [
        heat_of("ρ = ‖ΔW‖/‖W‖ by layer", ((m.name, m.rho) for m in found.modules), ".2e",
                reduce=max),
        heat_of(f"Share that a merge into {found.total.dtype} would swallow",
                ((m.name, m.loss) for m in found.modules), ".1%", reduce=max),
    ]  # fmt: skip
    return Section(f"Beside {found.base}", [
        *(h for h in maps if h is not None),
        Table("By family", ("family", *head),
              [(m.family, *_look_cells(m, formats)) for m in found.families],
              ("total", *_look_cells(found.total, formats))),
        Table("By module", ("module", *head),
              [(m.name, *_look_cells(m, formats)) for m in found.modules]),
    ])  # fmt: skip


def _look_cells(one: ModuleLook, formats: Sequence[str]) -> list[Cell]:
    return [one.dtype, number(one.rank), number(one.noise_rank), number(one.rho, ".2e"),
            number(one.amplification, ".3g"), share(one.loss),
            *(share(one.swallowed.get(word)) for word in formats)]  # fmt: skip


def risk_section(found: RiskStatistics) -> Section:
    """Numbers to look at before trusting a file."""
    head = ("‖ΔW‖", "of its family's mean", "σ₁", "σ₁² of the energy", "entropy", "kurtosis",
            "intruders")  # fmt: skip
    rows: list[Sequence[Cell]] = [
        (m.name, number(m.norm), number(m.relative_norm, ".3g"), number(m.sigma_1),
         share(m.concentration), number(m.entropy, ".3g"), number(m.kurtosis, ".3g"),
         number(m.intruders, ",d"))
        for m in found.modules
    ]  # fmt: skip
    chart = heat_of(
        "‖ΔW‖ over the mean of its family",
        ((m.name, m.relative_norm) for m in found.modules),
        ".2f",
        reduce=max,
    )
    blocks: list[Block] = [] if chart is None else [chart]
    return Section("Statistics", [*blocks, Table("By module", ("module", *head), rows)],
                   "Numbers, no verdict.")  # fmt: skip
