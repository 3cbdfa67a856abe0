"""What all pictures share.  matplotlib is an extra: ``pip install 'loratool[plot]'``."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loratool.errors import UsageError

SUFFIXES = (".png", ".svg", ".pdf")
INK, FAINT = "#24292f", "#d0d7de"


def check_chart(path: Path) -> None:
    """Refuse a picture that cannot be drawn, before the work.

    Raises:
        UsageError: LT-249, a suffix that is no picture's, or no matplotlib.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError("LT-249", "cannot draw this kind of file", got=str(path),
                         expected=", ".join(SUFFIXES))  # fmt: skip
    if find_spec("matplotlib") is None:
        raise UsageError("LT-249", "--plot needs matplotlib", hint="pip install 'loratool[plot]'")


def draw_figure(suffix: str, draw: Callable[[Any], Any]) -> bytes:
    """Make a figure with matplotlib's ``pyplot``; returns the file of this kind."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style: Any = {
        "font.size": 9, "font.family": "DejaVu Sans", "text.color": INK, "axes.labelcolor": INK,
        "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": FAINT,
        "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left",
        "svg.hashsalt": "loratool", "svg.fonttype": "none", "text.parse_math": False,
    }  # fmt: skip
    kind = suffix.lower().removeprefix(".")
    # No dates or versions in the file: the same report gives the same picture.
    key = {"png": "Software", "svg": "Date", "pdf": "CreationDate"}[kind]
    made = io.BytesIO()
    with matplotlib.rc_context(style):
        figure = draw(pyplot)
        try:
            figure.savefig(made, format=kind, dpi=160, metadata={key: None}, facecolor="white")
        finally:
            pyplot.close(figure)
    return made.getvalue()


def tidy(axes: Any) -> None:
    """No frames and no tick marks."""
    for axis in axes:
        axis.tick_params(length=0)
        for spine in axis.spines.values():
            spine.set_visible(False)


def ticks(axis: Any, labels: Sequence[str], most: int = 20) -> None:
    """Every label, or every n-th where there are more than fit."""
    step = max(1, -(-len(labels) // most))
    axis.set_ticks(range(0, len(labels), step), labels[::step])


def short(text: str, limit: int) -> str:
    """Printable, and cut in the middle: both ends of a name tell something."""
    clean = "".join(c if c.isprintable() else "?" for c in text)
    if len(clean) <= limit:
        return clean
    half = (limit - 1) // 2
    return f"{clean[:half]}…{clean[-half:]}"
