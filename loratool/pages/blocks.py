"""What a page is made of: data alone.  Texts may be foreign; `render` makes them safe."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

from loratool.frozen import Frozen
from loratool.report.text import format_bytes, format_count, format_share

BARS = 20
"""Steps of the bars behind shares."""


class Number(NamedTuple):
    """A cell that sorts by its value.

    Attributes:
        value: to sort by; None where there is none.
        text: as shown.
        bar: length of the bar behind it, 0 to `BARS`; None = no bar.
    """

    value: float | None
    text: str
    bar: int | None = None


class Verdict(NamedTuple):
    """A cell with a sign: ``yes``, ``no``, ``wrong`` or ``unsure``."""

    verdict: str
    text: str


class Spark(NamedTuple):
    """A small line: heights of 0 to 1, and what it shows in words."""

    heights: tuple[float, ...]
    text: str


Cell = str | Number | Verdict | Spark


def number(value: float | None, form: str = ",.4g") -> Number:
    """A number, or a dash for none and NaN."""
    if value is None or math.isnan(value):
        return Number(None, "–")
    return Number(value, format(value, form))


def count(value: float) -> Number:
    """A number of elements: ``43.6 M``."""
    return Number(value, format_count(value))


def size(nbytes: float) -> Number:
    """Bytes: ``1.33 GB``."""
    return Number(nbytes, format_bytes(nbytes))


def share(value: float | None) -> Number:
    """A fraction as per cent, with a bar."""
    if value is None or math.isnan(value):
        return Number(None, "–")
    if math.isinf(value):
        return Number(value, "∞", BARS)
    return Number(value, format_share(value, aligned=True), round(BARS * min(1.0, abs(value))))


class Table(Frozen):
    """Rows that can be sorted and searched.

    Attributes:
        caption: what it shows.
        head: names of the columns.
        rows: cells; the first one names the row.
        foot: a last row that stays last.
        is_folded: it is opened by who wants it.
    """

    kind: ClassVar[str] = "table"
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    foot: Sequence[Cell] = ()
    is_folded: bool = False


class HeatCell(NamedTuple):
    """One place of a heat map: its colour (0 to 18, or 0 to 20 on two sides of 10) and number."""

    level: int | None
    text: str


class Heat(Frozen):
    """A grid of colours.

    Attributes:
        caption: what it shows.
        groups: (name, columns) from left to right.
        columns: names of the columns.
        rows: (name, cells).
        legend: the two ends of the scale, in words.
        is_two_sided: around zero.
        has_text: numbers are shown, not only read aloud.
    """

    kind: ClassVar[str] = "heat"
    caption: str
    groups: Sequence[tuple[str, int]]
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[HeatCell]]]
    legend: tuple[str, str]
    is_two_sided: bool = False
    has_text: bool = False


class Curve(Frozen):
    """A line of a chart: its name and heights, the first one 1."""

    name: str
    heights: Sequence[float]


class Chart(Frozen):
    """Curves on a logarithmic scale.

    Attributes:
        caption: what it shows.
        across: what goes to the right.
        curves: eight at most have colours.
    """

    kind: ClassVar[str] = "chart"
    caption: str
    across: str
    curves: Sequence[Curve]


class Entries(Frozen):
    """Names and values, folded if there are many."""

    kind: ClassVar[str] = "entries"
    caption: str
    rows: Sequence[tuple[str, str]]


class Card(Frozen):
    """A file of a gallery.

    Attributes:
        name: of the file.
        picture: a checked data URI, "" if there is none.
        missing: why there is none, in words.
        bars: (name, share) of what it changes, where there is no picture.
        badges: short facts.
        trigger: words that call it up.
        lines: (label, text) below.
        loads: (verdict, the same as words, programs).
        same_as: name of its twin, "" if none.
        data: what filters and orders go by: family, rank, bytes, programs that load it.
    """

    name: str
    picture: str
    missing: str
    bars: Sequence[tuple[str, float]]
    badges: Sequence[str]
    trigger: str
    lines: Sequence[tuple[str, str]]
    loads: Sequence[tuple[str, str, str]]
    same_as: str
    data: Mapping[str, str | float]


class Gallery(Frozen):
    """Cards that can be searched and filtered; ``families`` and ``programs`` to choose from."""

    kind: ClassVar[str] = "gallery"
    caption: str
    cards: Sequence[Card]
    families: Sequence[str] = ()
    programs: Sequence[str] = ()


Block = Table | Heat | Chart | Entries | Gallery


class Section(Frozen):
    """A heading, a sentence, and what is below."""

    title: str
    blocks: Sequence[Block]
    words: str = ""


class Page(Frozen):
    """A whole page.

    Attributes:
        command: that made it.
        title: what it is about.
        subtitle: short facts.
        tiles: (name, value) of the largest numbers.
        facts: (label, texts), as a terminal would say them.
        warnings: what should not be overlooked.
        notes: what is good to know.
        sections: the rest.
    """

    command: str
    title: str
    subtitle: Sequence[str] = ()
    tiles: Sequence[tuple[str, str]] = ()
    facts: Sequence[tuple[str, Sequence[str]]] = ()
    warnings: Sequence[str] = ()
    notes: Sequence[str] = ()
    sections: Sequence[Section] = ()
