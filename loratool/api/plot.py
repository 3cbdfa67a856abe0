"""Pictures of spectra; matplotlib is imported here and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loratool.report import AdapterSpectrum, ModuleSpectrum

_INK, _SOFT = "#22303c", "#8a97a3"
_COLOURS = ("#2a6fbb", "#d1495b", "#2e9c75", "#edae49", "#7a5195", "#00798c", "#b5651d", "#6c757d")


def draw_spectrum(spectrum: AdapterSpectrum, path: Path, *, title: str) -> None:
    """Spectra by family on the left, ‖ΔW‖ by layer and family on the right.

    Args:
        spectrum: measured.
        path: ``.png`` or ``.svg`` to write; no dates in it, the same bytes each time.
        title: of the whole picture.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings: Any = {
        "font.size": 10, "axes.edgecolor": _SOFT, "axes.labelcolor": _INK, "text.color": _INK,
        "xtick.color": _INK, "ytick.color": _INK, "axes.spines.top": False,
        "axes.spines.right": False, "svg.hashsalt": "loratool", "axes.titlelocation": "left",
    }  # fmt: skip
    with mpl.rc_context(settings):
        figure = Figure(figsize=(12, 5.2), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
        _curves(left, spectrum)
        _map(figure, right, spectrum)
        metadata = {"Date": None} if path.suffix.lower() == ".svg" else {"Software": None}
        figure.savefig(path, dpi=150, metadata=metadata)


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
        label = f"{family.family}  (90 % at {family.rank_90:g})"
        axes.plot(places, family.profile, color=colour, lw=1.8, label=label)
        axes.fill_between(places, low, high, color=colour, alpha=0.12, lw=0)
        lowest = min(lowest, *(v for v in family.profile if v > 1e-7))
    axes.set_yscale("log")
    axes.set_ylim(bottom=lowest / 2)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("i")
    axes.set_ylabel("σᵢ / σ₁")
    axes.set_title("Spectra by family: median, range", fontsize=11)
    axes.grid(True, which="major", color="#e6eaed", lw=0.8)
    axes.legend(frameon=False, fontsize=9)


def _map(figure: Any, axes: Any, spectrum: AdapterSpectrum) -> None:
    """‖ΔW‖_F of every module; modules without a layer number lie in row 0."""
    names = [f.family for f in spectrum.families]
    live = [m for m in spectrum.modules if m.is_finite]
    rows = max((m.layer or 0 for m in live), default=0) + 1
    norms = [[float("nan")] * len(names) for _ in range(rows)]
    for (layer, family), group in _cells(live).items():
        norms[layer][names.index(family)] = sum(m.norm**2 for m in group) ** 0.5
    image = axes.imshow(norms, aspect="auto", cmap="viridis", origin="lower")
    axes.set_xticks(range(len(names)), names, rotation=35, ha="right")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("layer")
    axes.set_title("‖ΔW‖ by layer and family", fontsize=11)
    bar = figure.colorbar(image, ax=axes, shrink=0.9)
    bar.outline.set_visible(False)


def _cells(modules: list[ModuleSpectrum]) -> dict[tuple[int, str], list[ModuleSpectrum]]:
    cells: dict[tuple[int, str], list[ModuleSpectrum]] = {}
    for module in modules:
        cells.setdefault((module.layer or 0, module.family), []).append(module)
    return cells
