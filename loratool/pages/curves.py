"""Geometry of curves, as SVG wants it: numbers alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

from loratool.frozen import Frozen
from loratool.pages.blocks import Chart

LEFT, TOP, WIDTH, HEIGHT = 58, 12, 660, 250
_FLOOR = 1e-6
_TICKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Drawn(Frozen):
    """A chart in units of its view box: ``(place, words)`` of ticks, ``(name, path)`` of curves."""

    down: Sequence[tuple[float, str]]
    across: Sequence[tuple[float, str]]
    curves: Sequence[tuple[str, str]]


def spark_path(heights: Sequence[float]) -> str:
    """A path in a box of 60 by 16, square roots so that small values are seen."""
    last = max(1, len(heights) - 1)
    points = [(58 * i / last + 1, 15 - 14 * math.sqrt(min(1.0, max(0.0, h))))
              for i, h in enumerate(heights)]  # fmt: skip
    if len(points) == 1:
        points.append((59.0, points[0][1]))
    return path(points)


def path(points: Sequence[tuple[float, float]]) -> str:
    """Lines from point to point."""
    return "M" + "L".join(f"{x:.4g} {y:.4g}" for x, y in points)


def draw(chart: Chart) -> Drawn:
    """Curves on a logarithmic scale from 1 down to the smallest value, six decades at most."""
    values = [h for c in chart.curves for h in c.heights if h > 0]
    floor = max(_FLOOR, min(values, default=0.1))
    decades = max(1, math.ceil(-math.log10(floor) - 1e-9))
    longest = max((len(c.heights) for c in chart.curves), default=1)

    def x(i: int) -> float:
        return LEFT + WIDTH * i / max(1, longest - 1)

    def y(height: float) -> float:
        return TOP + HEIGHT * -math.log10(max(height, 10.0**-decades)) / decades

    return Drawn(
        [(y(10.0**-d), "1" if d == 0 else f"{10.0**-d:g}") for d in range(decades + 1)],
        [(x(i - 1), str(i)) for i in _TICKS if i <= longest],
        [(c.name, path([(x(i), y(h)) for i, h in enumerate(c.heights)] * (1 + (longest == 1))))
         for c in chart.curves],
    )  # fmt: skip
