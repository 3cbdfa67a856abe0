"""Pictures of reports.  matplotlib is an extra: ``pip install 'loratool[plot]'``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.errors import DiskError, OutputError, UsageError

if TYPE_CHECKING:
    from loratool.report.compare import CompareReport

SUFFIXES = (".png", ".svg", ".pdf")
_INK, _FAINT = "#24292f", "#d0d7de"


def check_chart(path: str | Path | None) -> None:
    """Refuse a picture that cannot be drawn, before the work.

    Raises:
        UsageError: LT-249, a suffix that is no picture's, or no matplotlib.
        OutputError: LT-508, the file exists.
    """
    if path is None:
        return
    if Path(path).suffix.lower() not in SUFFIXES:
        raise UsageError("LT-249", "cannot draw this kind of file", got=str(path),
                         expected=", ".join(SUFFIXES))  # fmt: skip
    if find_spec("matplotlib") is None:
        raise UsageError("LT-249", "--plot needs matplotlib", hint="pip install 'loratool[plot]'")
    refuse_existing(Path(path))


def refuse_existing(path: Path) -> None:
    """Refuse to write over a file.

    Raises:
        OutputError: LT-508.
        DiskError: LT-602, its folder does not exist.
    """
    if path.exists():
        raise OutputError("LT-508", "the file exists", file=path, hint="choose another name")
    if not path.absolute().parent.is_dir():
        raise DiskError("LT-602", "the output's folder does not exist", file=path.parent)


def draw_comparison(report: CompareReport, path: Path) -> str:
    """Two adapters: cosine per module and φ on both sides; more: the matrix of cosines."""
    if len(report.adapters) > 2:
        return _save(path, lambda plt: _draw_matrix(plt, report))
    return _save(path, lambda plt: _draw_pair(plt, report))


def _save(path: Path, draw: Callable[[Any], Any]) -> str:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style: Any = {
        "font.size": 9, "font.family": "DejaVu Sans", "text.color": _INK, "axes.labelcolor": _INK,
        "xtick.color": _INK, "ytick.color": _INK, "axes.edgecolor": _FAINT,
        "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left",
        "svg.hashsalt": "loratool", "svg.fonttype": "none", "text.parse_math": False,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = draw(pyplot)
        temporary = path.with_name(f".{path.name}.tmp{path.suffix}")
        # No dates or versions in the file: the same report gives the same picture.
        key = {".png": "Software", ".svg": "Date", ".pdf": "CreationDate"}[path.suffix.lower()]
        try:
            figure.savefig(temporary, dpi=160, metadata={key: None}, facecolor="white")
            temporary.replace(path)
        except OSError as error:
            raise DiskError("LT-604", "cannot write", file=path, got=error.strerror) from error
        finally:
            temporary.unlink(missing_ok=True)
            pyplot.close(figure)
    return str(path)


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
    first, second = (_short(a, 34) for a in report.adapters)
    figure.suptitle(
        f"{first}  ×  {second}     cosine {report.matrix[0][1]:+.3f}", x=0.01, ha="left",
        fontsize=11, fontweight="bold",
    )  # fmt: skip
    image = axes[0].imshow(cosines, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
    axes[0].set_title("cosine of ΔW")
    _ticks(axes[0].yaxis, [_short(f, 24) for f in families], 40)
    _ticks(axes[0].xaxis, ["" if layer is None else str(layer) for layer in rows])
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
        axis.set_xlabel(f"j   leading directions of {_short(second, 20)}\n"
                        f"random subspaces: {chance:.3f}")  # fmt: skip
        axis.set_ylabel(f"i   of {_short(first, 24)}")
        _ticks(axis.xaxis, [str(j + 1) for j in range(len(table[0]) if table else 0)], 12)
        _ticks(axis.yaxis, [str(i + 1) for i in range(len(table))], 12)
        bar = figure.colorbar(image, ax=axis, shrink=0.8, pad=0.02)
        bar.outline.set_visible(False)
        if not math.isnan(chance):
            bar.ax.axhline(chance, color="#ff7b72", linewidth=1.5)
    _clean(axes)
    return figure


def _draw_matrix(plt: Any, report: CompareReport) -> Any:
    count = len(report.adapters)
    side = max(4.0, min(14.0, 0.55 * count + 2.2))
    figure, axis = plt.subplots(figsize=(side + 1.2, side), layout="constrained")
    image = axis.imshow(report.matrix, cmap="RdBu_r", vmin=-1, vmax=1)
    axis.set_title("cosine of ΔW over all modules")
    names = [_short(name, 28) for name in report.adapters]
    _ticks(axis.yaxis, names, 40)
    _ticks(axis.xaxis, names, 40)
    axis.tick_params(axis="x", labelrotation=45)
    for label in axis.get_xticklabels():
        label.set_horizontalalignment("right")
    if count <= 16:
        for i, row in enumerate(report.matrix):
            for j, value in enumerate(row):
                axis.text(j, i, "–" if math.isnan(value) else f"{value:.2f}", ha="center",
                          va="center", fontsize=8,
                          color="white" if abs(value) > 0.6 else _INK)  # fmt: skip
    figure.colorbar(image, ax=axis, shrink=0.8, pad=0.02).outline.set_visible(False)
    _clean([axis])
    return figure


def _clean(axes: Any) -> None:
    for axis in axes:
        axis.tick_params(length=0)
        for spine in axis.spines.values():
            spine.set_visible(False)


def _ticks(axis: Any, labels: Sequence[str], most: int = 20) -> None:
    """Every label, or every n-th where there are more than fit."""
    step = max(1, -(-len(labels) // most))
    axis.set_ticks(range(0, len(labels), step), labels[::step])


def _short(text: str, limit: int) -> str:
    """Printable, and cut in the middle: both ends of a name tell something."""
    clean = "".join(c if c.isprintable() else "?" for c in text)
    if len(clean) <= limit:
        return clean
    half = (limit - 1) // 2
    return f"{clean[:half]}…{clean[-half:]}"


def _mean(values: Sequence[float]) -> float:
    real = [v for v in values if not math.isnan(v)]
    return sum(real) / len(real) if real else math.nan
