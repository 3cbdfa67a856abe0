"""What all pictures share.  matplotlib is an extra: ``pip install 'loratool[plot]'``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loratool.errors import DiskError, OutputError, UsageError

SUFFIXES = (".png", ".svg", ".pdf")
INK, FAINT = "#24292f", "#d0d7de"


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


def save_figure(path: Path, draw: Callable[[Any], Any]) -> str:
    """Make a figure with matplotlib's ``pyplot`` and write it, whole or not at all.

    Raises:
        DiskError: LT-604.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style: Any = {
        "font.size": 9, "font.family": "DejaVu Sans", "text.color": INK, "axes.labelcolor": INK,
        "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": FAINT,
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
