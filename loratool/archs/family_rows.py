"""Rows of the maps of image and video models: weights, and what each program calls them.

Numbers are matched, never listed: a flattened name with ``#`` for its numbers is looked up, then
the numbers that a template fixes are compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache, cached_property
from typing import Any

from loratool.frozen import Frozen, field
from loratool.lazy import regex

NUMBER = regex(r"\{n\}|\d+")
Numbers = tuple[str, ...]


class Name(Frozen):
    """What one naming calls some parts of a row.

    Attributes:
        template: of a module, or of a whole tensor where the row is of tensors.
        first: the first of the row's parts that it holds.
        stop: the one behind the last.
    """

    template: str
    first: int
    stop: int


class Row(Frozen, dict=True):
    """Weights that are the same in every naming.

    Attributes:
        family: name of its file.
        component: ``unet`` (or transformer) or ``te``.
        names: naming -> what it calls the row's parts, in the order of their rows.
        parts: how many parts the finest naming has.
        split: a word per part, "in" = the module's input width, "*" = an equal share of the rest.
        swap: "" or "always", or "2in" = where a module has twice as many rows as columns: diffusers
            has the two halves of the rows in the other order than the original; "axes" = the
            original has (in, out).
        like_diffusers: the namings that have diffusers' order and numbers.
        is_tensor: the names are those of whole tensors, as of parameters without ``.weight``.
        grows: the key of diffusers' configuration that states the columns of a weight which may get
            more of them; "" = it never does.
        columns: of that weight in the family's own models.
        lower: the naming that stands for diffusers' where the weight has fewer rows than columns:
            the last block of some models calls a module otherwise; "" = none.
        blocks: where the sides number their blocks differently: the first numbers of a name of the
            original's -> those of diffusers'.
    """

    family: str
    component: str
    names: Mapping[str, tuple[Name, ...]]
    parts: int = 1
    split: tuple[str, ...] = ()
    swap: str = ""
    like_diffusers: frozenset[str] = frozenset({"diffusers"})
    is_tensor: bool = False
    grows: str = ""
    columns: int = 0
    lower: str = ""
    blocks: tuple[tuple[Numbers, Numbers], ...] = ()

    def fill(self, name: Name, naming: str, numbers: Numbers) -> str:
        """A name, with the numbers that a name of the original has."""
        if self.blocks and naming in self.like_diffusers:
            numbers = _renumbered(numbers, self._to_diffusers)
        pieces = name.template.split("{n}")
        return pieces[0] + "".join(n + p for n, p in zip(numbers, pieces[1:], strict=True))

    def original_numbers(self, naming: str, numbers: Numbers) -> Numbers | None:
        """The numbers that the original has for those of a name; None if there are none such."""
        if not self.blocks:
            return numbers
        side = self.side_of(naming)
        table = self._to_original if side else self._to_diffusers
        if numbers[: len(self.blocks[0][side])] not in table:
            return None
        return _renumbered(numbers, table) if side else numbers

    def side_of(self, naming: str) -> int:
        """0 for a naming whose blocks are numbered as in the original, 1 as in diffusers."""
        return int(naming in self.like_diffusers)

    @cached_property
    def dotted(self) -> frozenset[str]:
        """Every name of any of its parts, with ``#`` for numbers."""
        return frozenset(
            NUMBER.sub("#", name.template) for names in self.names.values() for name in names
        )

    @cached_property
    def _to_diffusers(self) -> dict[Numbers, Numbers]:
        return dict(self.blocks)

    @cached_property
    def _to_original(self) -> dict[Numbers, Numbers]:
        return {there: here for here, there in self.blocks}


class Family(Frozen):
    """One file of ``data/families/``.

    Attributes:
        name: of the file.
        title: for people.
        component: of its modules: ``unet`` or ``te``.
        rows: all of them.
        tells: what tells it from others that have the same names: see `loratool.archs.families`.
        written: the naming that its modules take where there is no base, "" = as they are spelled.
        flat: the naming that files with flat names (kohya's) have, which most programs load.
        encoders: families of its pipeline's text encoders, in its order; "" = none that is known.
        part: what diffusers' pipeline calls its model: ``transformer`` or ``unet``.
        kin: the family as which programs load it: itself, or what it is ``like``.
        versions: what trainers' metadata call it -> label of the size, "" where it has none; the
            first one is what is written.
    """

    name: str
    title: str
    component: str
    rows: tuple[Row, ...]
    tells: Mapping[str, Any]
    versions: Mapping[str, str]
    written: str = ""
    flat: str = "original"
    kin: str = ""
    encoders: tuple[str, ...] = ()
    part: str = "transformer"


class Entry(Frozen):
    """A name of a row in the index."""

    row: Row
    naming: str
    name: Name


class Telling(Frozen):
    """Which numbers of a name decide on its rows.

    Attributes:
        places: of numbers that rows fix.
        length: of the first numbers, which name a block, 0 if any may stand there.
        blocks: the blocks that there are.
    """

    places: tuple[int, ...]
    length: int = 0
    blocks: frozenset[Numbers] = frozenset()

    def has(self, numbers: Sequence[str]) -> bool:
        """True if there is such a block."""
        return not self.length or tuple(numbers[: self.length]) in self.blocks


_Fixed = dict[tuple[int, ...], dict[tuple[str, ...], list[Entry]]]


class Index(Frozen):
    """Flat names with ``#`` for numbers -> which numbers are fixed -> what they are -> rows."""

    modules: dict[str, _Fixed] = field(default_factory=dict)
    tensors: dict[str, _Fixed] = field(default_factory=dict)

    def put(self, row: Row) -> None:
        """Add every name of a row once."""
        index, seen = self.tensors if row.is_tensor else self.modules, set()
        for naming, names in row.names.items():
            for name in names:
                key, places, numbers = shape = _shape_of(name.template)
                if shape not in seen:
                    seen.add(shape)
                    fixed = index.setdefault(key, {}).setdefault(places, {})
                    fixed.setdefault(numbers, []).append(Entry(row, naming, name))

    def find(self, flat: str, *, is_tensor: bool) -> Iterator[tuple[Entry, Numbers]]:
        """Entries that a flat name fits, and the numbers that the original has in their holes."""
        groups = (self.tensors if is_tensor else self.modules).get(NUMBER.sub("#", flat))
        if groups is None:
            return
        numbers = NUMBER.findall(flat)
        for places, fixed in groups.items():
            entries = fixed.get(tuple([numbers[i] for i in places]))
            if entries:
                free = tuple([n for i, n in enumerate(numbers) if i not in places])
                for entry in entries:
                    found = entry.row.original_numbers(entry.naming, free)
                    if found is not None:
                        yield entry, found

    def telling(self, key: str) -> Telling | None:
        """What decides on the rows of a flat name with ``#``; None if it has none."""
        whole = (self.tensors.get(key), self.tensors.get(f"{key}_weight"))
        groups = [some for some in (self.modules.get(key), *whole) if some]
        if not groups:
            return None
        places = sorted({i for some in groups for fixed in some for i in fixed})
        entries = [e for some in groups for table in some.values()
                   for several in table.values() for e in several]  # fmt: skip
        blocks = [{pair[e.row.side_of(e.naming)] for pair in e.row.blocks} for e in entries]
        if not all(blocks):
            return Telling(tuple(places))
        return Telling(tuple(places), len(next(iter(blocks[0]))), frozenset().union(*blocks))


def flatten(name: str) -> str:
    """A name as flat dialects have it."""
    return name.replace(".", "_")


@cache
def _shape_of(template: str) -> tuple[str, tuple[int, ...], tuple[str, ...]]:
    """(flat name with ``#``, which of its numbers are fixed, what they are)."""
    flat = flatten(template)
    fixed = [(i, n) for i, n in enumerate(NUMBER.findall(flat)) if n != "{n}"]
    return NUMBER.sub("#", flat), tuple(i for i, _ in fixed), tuple(n for _, n in fixed)


def cut(split: Sequence[str], rows: int, in_width: int | None = None) -> list[tuple[int, int]]:
    """The rows (start, stop) of each part of a weight.

    Args:
        split: a word per part: "in" = as high as the weight is wide, "*" = a share of the rest.
        rows: of all parts together.
        in_width: columns of the weight; needed only for "in".

    Raises:
        ValueError: they cannot be cut so.
    """
    wide, shares = in_width or 0, split.count("*")
    rest = rows - split.count("in") * wide
    if rest < 0 or (rest % shares if shares else rest) or ("in" in split and not wide):
        raise ValueError(f"{rows} rows do not make {' + '.join(split)} with width {in_width}")
    sizes = [wide if word == "in" else rest // shares for word in split]
    return [(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]


def holds_for(swap: str, rows: int, in_width: int) -> bool:
    """True if the word of a swap holds for a weight of this shape."""
    return swap == "always" or (swap == "2in" and rows == 2 * in_width)


def _renumbered(numbers: Numbers, table: Mapping[Numbers, Numbers]) -> Numbers:
    """The first numbers changed for those of the other side."""
    length = len(next(iter(table)))
    return table[numbers[:length]] + numbers[length:]
