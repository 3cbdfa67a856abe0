"""Heat maps: modules by layer and by what they are called."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence

from loratool.pages.blocks import Heat, HeatCell
from loratool.report.families import place_of

LEVELS, SIDE = 19, 10
"""Colours of a scale from 0, and of each side of one around 0."""
MOST_ROWS, MOST_COLUMNS = 40, 160

Reduce = Callable[[Sequence[float]], float]


def together(values: Sequence[float]) -> float:
    """The norm of parts whose norms are given."""
    return math.sqrt(math.fsum(v * v for v in values))


def heat_of(
    caption: str,
    values: Iterable[tuple[str, float]],
    form: str = ".3g",
    *,
    reduce: Reduce = together,
    top: float | None = None,
    is_two_sided: bool = False,
) -> Heat | None:
    """A heat map of (module, value) by layer and family; None if it would be a single column.

    Args:
        caption: what it shows.
        values: NaN leaves a place empty.
        form: of the numbers.
        reduce: what becomes of several modules in one place.
        top: where the scale ends; None = at the largest value.
        is_two_sided: colours on both sides of 0.
    """
    cells: dict[tuple[str, tuple[str, int | None]], list[float]] = {}
    for name, value in values:
        if math.isfinite(value):
            place = place_of(name)
            cells.setdefault((place.family, (place.group, place.layer)), []).append(value)
    rows = list(dict.fromkeys(family for family, _ in cells))
    groups = list(dict.fromkeys(group for _, (group, _) in cells))
    columns = sorted({column for _, column in cells},
                     key=lambda c: (groups.index(c[0]), -1 if c[1] is None else c[1]))  # fmt: skip
    if len(columns) < 2:
        return None
    shown, columns = rows[:MOST_ROWS], columns[:MOST_COLUMNS]
    found = {where: reduce(many) for where, many in cells.items()}
    end = top if top is not None else max(map(abs, found.values()), default=0.0)
    short = _short_names(groups)
    return Heat(
        caption + (f" ({len(rows) - len(shown)} more rows in the table)" if rows != shown else ""),
        [(short[g], n) for g in groups if (n := sum(c[0] == g for c in columns))],
        ["–" if layer is None else str(layer) for _, layer in columns],
        [(family, [_cell(found.get((family, c)), end, form, is_two_sided) for c in columns])
         for family in shown],
        (_written(-end if is_two_sided else 0.0, form), _written(end, form)),
        is_two_sided,
    )  # fmt: skip


def matrix(
    caption: str,
    names: tuple[Sequence[str], Sequence[str]],
    values: Sequence[Sequence[float]],
    form: str = ".2f",
    *,
    is_two_sided: bool = False,
    has_text: bool = False,
) -> Heat:
    """A heat map of a matrix of values of at most 1; ``names`` of its rows and columns."""
    rows, columns = names
    return Heat(
        caption, [("", len(columns))], columns,
        [(name, [_cell(v, 1.0, form, is_two_sided) for v in row])
         for name, row in zip(rows, values, strict=True)],
        ("-1" if is_two_sided else "0", "+1" if is_two_sided else "1"), is_two_sided, has_text,
    )  # fmt: skip


def _cell(value: float | None, end: float, form: str, is_two_sided: bool) -> HeatCell:
    if value is None or math.isnan(value):
        return HeatCell(None, "–")
    part = value / end if end > 0 else 0.0
    if is_two_sided:
        level = SIDE + round(SIDE * max(-1.0, min(1.0, part)))
    else:
        level = min(LEVELS - 1, int(LEVELS * max(0.0, part)))
    return HeatCell(level, _written(value, form))


def _written(value: float, form: str) -> str:
    """The number; what is written like zero has no sign."""
    text = format(value, form)
    return text if text.strip("+-0.%e") else format(0.0, form.replace("+", ""))


def _short_names(groups: Sequence[str]) -> dict[str, str]:
    """``layers`` for ``model.layers`` where no other group ends like it."""
    last = {g: g.rpartition(".")[2] for g in groups}
    ends = list(last.values())
    return {g: last[g] if ends.count(last[g]) == 1 else g for g in groups}


median: Reduce = statistics.median
