"""Pictures of spectra."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from loratool.report.chart import FAINT, draw_figure, short, ticks, tidy

if TYPE_CHECKING:
    from loratool.report.spectrum import AdapterSpectrum

_COLOURS = ("#2a6fbb", "#d1495b", "#2e9c75", "#edae49", "#7a5195", "#00798c", "#b5651d", "#6c757d")


def draw_spectrum(spectrum: AdapterSpectrum, suffix: str, *, title: str) -> bytes:
    """Spectra by family on the left, ‖ΔW‖_F by layer and family on the right."""

    def draw(plt: Any) -> Any:
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(12, 5.2), layout="constrained", width_ratios=(1.15, 1)
        )
        figure.suptitle(short(title, 100), x=0.01, ha="left", fontsize=11, fontweight="bold")
        _curves(left, spectrum)
        _map(figure, right, spectrum)
        tidy([left, right])
        return figure

    return draw_figure(suffix, draw)


def _curves(axes: Any, spectrum: AdapterSpectrum) -> None:
    """Median of σᵢ/σ₁ per family, with the range of its modules."""
    lowest = 1.0
    for number, family in enumerate(spectrum.families):
        colour = _COLOURS[number % len(_COLOURS)]
        live = [m for m in spectrum.modules if m.family == family.family and m.sigma_1 > 0]
        if not live:
            continue
        places = range(1, len(family.profile) + 1)
        ratios = [[m.sigma[i] / m.sigma_1 for m in live if i < len(m.sigma)] for i in
                  range(len(family.profile))]  # fmt: skip
        low, high = [min(r) for r in ratios], [max(r) for r in ratios]
        label = f"{short(family.family, 24)}  (90 % at {family.rank_90:g})"
        axes.plot(places, family.profile, color=colour, lw=1.8, label=label)
        axes.fill_between(places, low, high, color=colour, alpha=0.12, lw=0)
        lowest = min(lowest, *(v for v in family.profile if v > 1e-7))
    axes.set_yscale("log")
    axes.set_ylim(bottom=lowest / 2)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("i")
    axes.set_ylabel("σᵢ / σ₁")
    axes.set_title("Spectra by family: median, range")
    axes.grid(True, which="major", color=FAINT, lw=0.6)
    axes.legend(frameon=False)


def _map(figure: Any, axes: Any, spectrum: AdapterSpectrum) -> None:
    """‖ΔW‖_F of every module; modules without a layer number lie in row 0."""
    names = [f.family for f in spectrum.families]
    live = [m for m in spectrum.modules if m.is_finite]
    rows = max((m.layer or 0 for m in live), default=0) + 1
    norms = [[math.nan] * len(names) for _ in range(rows)]
    for m in live:
        row, column = norms[m.layer or 0], names.index(m.family)
        row[column] = math.hypot(m.norm, 0.0 if math.isnan(row[column]) else row[column])
    image = axes.imshow(norms, aspect="auto", cmap="viridis", origin="lower")
    ticks(axes.xaxis, [short(n, 24) for n in names], 40)
    axes.tick_params(axis="x", labelrotation=35)
    for label in axes.get_xticklabels():
        label.set_horizontalalignment("right")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("layer")
    axes.set_title("‖ΔW‖ by layer and family")
    figure.colorbar(image, ax=axes, shrink=0.9).outline.set_visible(False)
