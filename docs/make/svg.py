"""Small pictures as SVG, inside of a page: text takes the page's colour, dark or light."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

BLUE, ORANGE, GREEN, GREY = "#4a90d9", "#e0812a", "#3aa57a", "#8a8f98"
"""At least 3 : 1 against white and against the theme's dark."""


def picture(width: int, height: int, parts: Iterable[str], title: str) -> str:
    """A whole figure; ``title`` is what a screen reader says."""
    words = escape(title)
    head = (f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{words}" '
            'style="width:100%;max-width:{0}px;height:auto;font:13px sans-serif" '
            'fill="currentColor">'.format(width))  # fmt: skip
    return f"<figure>{head}{''.join(parts)}</svg><figcaption>{words}</figcaption></figure>"


def text(x: float, y: float, words: str, *, anchor: str = "middle", size: int = 13) -> str:
    """Words at a place."""
    return (f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" '
            f'font-size="{size}">{escape(words)}</text>')  # fmt: skip


def line(x0: float, y0: float, x1: float, y1: float, colour: str = GREY, width: float = 1,
         dash: str = "") -> str:  # fmt: skip
    """A line."""
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return (f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" stroke="{colour}" '
            f'stroke-width="{width}"{dashes}/>')  # fmt: skip


def rect(x: float, y: float, w: float, h: float, colour: str, opacity: float = 1) -> str:
    """A filled rectangle."""
    return (f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" fill="{colour}" '
            f'fill-opacity="{opacity:.2f}"/>')  # fmt: skip


def dots(points: Iterable[tuple[float, float]], colour: str, radius: float = 3) -> str:
    """Dots."""
    return "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}"/>'
                   for x, y in points)  # fmt: skip


def path(points: Sequence[tuple[float, float]], colour: str) -> str:
    """A line through points."""
    through = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{through}" fill="none" stroke="{colour}" stroke-width="2"/>'


def heat(x: float, y: float, cell: float, values: Sequence[Sequence[float]], top: float) -> str:
    """A matrix: blue below zero, orange above, as strong as it is large."""
    return "".join(
        rect(x + j * cell, y + i * cell, cell, cell, BLUE if value < 0 else ORANGE,
             min(1.0, abs(value) / top))
        for i, row in enumerate(values) for j, value in enumerate(row)
    )  # fmt: skip
