"""Pictures of comparisons."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from loratool.report.chart import INK, draw_figure, short, ticks, tidy

if TYPE_CHECKING:
    from loratool.report.compare import CompareReport


def draw_comparison(report: CompareReport, suffix: str) -> bytes:
    """Two adapters: cosine per module and φ on both sides; more: the matrix of cosines."""
    if len(report.adapters) > 2:
        return draw_figure(suffix, lambda plt: _draw_matrix(plt, report))
    return draw_figure(suffix, lambda plt: _draw_pair(plt, report))


def _draw_pair(plt: Any, report: CompareReport) -> Any:
    families = list(dict.fromkeys(m.family for m in report.modules))
    layers = sorted({m.layer for m in report.modules if m.layer is not None})
    rows: list[int | None] = [*layers] or [None]
    by_place = {(m.family, m.layer): m.cosine for m in report.modules}
    cosines = [[by_place.get((f, layer), math.nan) for layer in rows] for f in families]
    height = max(3.4, min(9.0, 0.26 * len(families) + 1.8))
    width = min(9.0, 2.4 + 0.2 * len(rows))
    figure, axes = plt.subplots(
        1, 3, figsize=(width + 7.2, height), layout="constrained",
        gridspec_kw={"width_ratios": [width, 3.6, 3.6]},
    )  # fmt: skip
    first, second = (short(a, 34) for a in report.adapters)
    figure.suptitle(
        f"{first}  ×  {second}     cosine {report.matrix[0][1]:+.3f}", x=0.01, ha="left",
        fontsize=11, fontweight="bold",
    )  # fmt: skip
    image = axes[0].imshow(cosines, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
    axes[0].set_title("cosine of ΔW")
    ticks(axes[0].yaxis, [short(f, 24) for f in families], 40)
    ticks(axes[0].xaxis, ["" if layer is None else str(layer) for layer in rows])
    axes[0].set_xlabel("layer" if layers else "")
    figure.colorbar(image, ax=axes[0], shrink=0.8, pad=0.02).outline.set_visible(False)
    for axis, table, side in (
        (axes[1], report.phi_A, "A side (input)"),
        (axes[2], report.phi_B, "B side (output)"),
    ):
        chance = _mean([m.random_A if side[0] == "A" else m.random_B for m in report.modules])
        image = axis.imshow(table or [[math.nan]], cmap="viridis", vmin=0, vmax=1,
                            origin="lower", aspect="equal")  # fmt: skip
        axis.set_title(f"φ(i, j), {side}")
        axis.set_xlabel(f"j   leading directions of {short(second, 20)}\n"
                        f"random subspaces: {chance:.3f}")  # fmt: skip
        axis.set_ylabel(f"i   of {short(first, 24)}")
        ticks(axis.xaxis, [str(j + 1) for j in range(len(table[0]) if table else 0)], 12)
        ticks(axis.yaxis, [str(i + 1) for i in range(len(table))], 12)
        bar = figure.colorbar(image, ax=axis, shrink=0.8, pad=0.02)
        bar.outline.set_visible(False)
        if not math.isnan(chance):
            bar.ax.axhline(chance, color="#ff7b72", linewidth=1.5)
    tidy(axes)
    return figure


def _draw_matrix(plt: Any, report: CompareReport) -> Any:
    count = len(report.adapters)
    side = max(4.0, min(14.0, 0.55 * count + 2.2))
    figure, axis = plt.subplots(figsize=(side + 1.2, side), layout="constrained")
    image = axis.imshow(report.matrix, cmap="RdBu_r", vmin=-1, vmax=1)
    axis.set_title("cosine of ΔW over all modules")
    names = [short(name, 28) for name in report.adapters]
    ticks(axis.yaxis, names, 40)
    ticks(axis.xaxis, names, 40)
    axis.tick_params(axis="x", labelrotation=45)
    for label in axis.get_xticklabels():
        label.set_horizontalalignment("right")
    if count <= 16:
        for i, row in enumerate(report.matrix):
            for j, value in enumerate(row):
                axis.text(j, i, "–" if math.isnan(value) else f"{value:.2f}", ha="center",
                          va="center", fontsize=8,
                          color="white" if abs(value) > 0.6 else INK)  # fmt: skip
    figure.colorbar(image, ax=axis, shrink=0.8, pad=0.02).outline.set_visible(False)
    tidy([axis])
    return figure


def _mean(values: Sequence[float]) -> float:
    real = [v for v in values if not math.isnan(v)]
    return sum(real) / len(real) if real else math.nan
