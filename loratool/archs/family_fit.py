"""How well does each family explain the modules of a file: names, shapes, depths, dots?"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from itertools import zip_longest
from typing import Any

from loratool.archs.family_files import families, index_of, templates_of
from loratool.archs.family_rows import NUMBER, Family, Telling, flatten
from loratool.archs.places import Place, places_of
from loratool.frozen import Frozen
from loratool.lazy import regex

Shape = tuple[int, ...]
LAST = 9
"""The rank of what only metadata can tell."""
_PIECES = regex(r"(\{n\}|\d+)")
_ENOUGH = 0.8  # of the names of a file are the family's


class Fit(Frozen):
    """How well a family explains a file; larger is better, but for the rank.

    Attributes:
        total: modules that it has.
        size: 0 if their shapes are of none of its known sizes; more for all that agrees with one.
        exact: modules whose dots it has too, where the file has dots.
        rank: of the family: the smaller first where all else is equal.
        label: of the size.
    """

    total: int
    size: int
    exact: int
    rank: int
    label: str

    @property
    def order(self) -> tuple[int, ...]:
        """Larger for what explains more."""
        return self.total, self.size, self.exact, -self.rank


class _Group(Frozen):
    """Modules of one name but for the numbers that do not tell rows apart.

    Attributes:
        place: of the name with the largest numbers.
        total: how many they are.
        shapes: all of theirs.
        is_exact: the family has the dots of the name where the file has them.
    """

    place: Place
    total: int
    shapes: frozenset[Shape]
    is_exact: bool


class _Pool(Frozen):
    """The same before the families are asked: one name, the shapes and numbers of all of them."""

    spelled: str
    shapes: list[Shape]
    numbers: list[list[str]]


def fitting(component: str, names: Mapping[str, Shape]) -> dict[str, Fit]:
    """Families that most of the names and all shapes agree with.

    Args:
        component: ``unet`` or ``te``.
        names: module without its component -> (out, in, …), () where it is not known.
    """
    fit: dict[str, Fit] = {}
    for family, groups in _groups(component, names).items():
        total = sum(group.total for group in groups)
        if total >= _ENOUGH * len(names) and (one := _fit(families()[family], groups, total)):
            fit[family] = one
    return fit


def _groups(component: str, names: Mapping[str, Shape]) -> dict[str, list[_Group]]:
    """Family -> its modules among the names, each kind of module looked up once."""
    index = index_of()
    known: dict[str, Telling | None] = {}
    pools: dict[tuple[str, tuple[str, ...]], _Pool] = {}
    for name, shape in names.items():
        key, numbers = _taken_apart(name)
        if key not in known:
            known[key] = index.telling(key)
        telling = known[key]
        if telling is not None and telling.has(numbers):
            kind = key, tuple([numbers[i] for i in telling.places])
            pool = pools.setdefault(kind, _Pool(name, [], []))
            pool.shapes.append(shape)
            pool.numbers.append(numbers)
    found: dict[str, list[_Group]] = {}
    for (key, _), pool in pools.items():
        telling = known[key]
        assert telling is not None
        dotted = NUMBER.sub("#", pool.spelled)
        once: dict[str, Place] = {}
        for place in places_of(component, _largest(key, pool, telling)):
            once.setdefault(place.family, place)
        for family, place in once.items():
            is_exact = "." in dotted and dotted in place.row.dotted
            group = _Group(place, len(pool.shapes), frozenset(pool.shapes), is_exact)
            found.setdefault(family, []).append(group)
    return found


@lru_cache(maxsize=1 << 14)  # files of one trainer have the same names
def _taken_apart(name: str) -> tuple[str, list[str]]:
    """(a flat name with ``#`` for its numbers, the numbers)."""
    pieces = _PIECES.split(flatten(name).strip("_"))
    return "#".join(pieces[::2]), pieces[1::2]


def _largest(key: str, pool: _Pool, telling: Telling) -> str:
    """The flat name with the largest of its numbers, in a block that there is."""
    largest = [max(column, key=int) for column in zip(*pool.numbers, strict=True)]
    largest[: telling.length] = pool.numbers[0][: telling.length]
    return "".join(w + n for w, n in zip_longest(key.split("#"), largest, fillvalue=""))


def _fit(family: Family, groups: list[_Group], total: int) -> Fit | None:
    """How well the shapes and depths agree with a family's; None if they contradict it."""
    tells = family.tells
    for template, ratio in tells.get("ratio", {}).items():
        for group in _whole(groups, templates_of(family, template)):
            if any(len(shape) > 1 and shape[0] != ratio * shape[1] for shape in group.shapes):
                return None
    needs = tells.get("needs", ())
    rank = LAST if needs and not _of(groups, family, needs) else tells.get("rank", 0)
    wide = _of(groups, family, tells.get("width", ()))
    width = {shape[1] for group in wide for shape in group.shapes if len(shape) > 1}
    depth = [_depth(prefix, groups) for prefix in tells.get("depth", ())]
    best, label = 0, ""
    for each, size in tells.get("sizes", {}).items():
        if (fit := _fits(size, width, depth)) > best:
            best, label = fit, each
    exact = sum(group.total for group in groups if group.is_exact)
    return Fit(total, best, exact, rank, label)


def _fits(size: Mapping[str, Any], width: set[int], depth: list[int]) -> int:
    """0 if a size is not that of the modules; more for all that agrees."""
    if width != {size.get("width")}:
        return 0
    wanted: list[int] = size.get("depth", [0] * len(depth))
    if any(seen > most > 0 for seen, most in zip(depth, wanted, strict=True)):
        return 0
    return 2 + (any(depth) and depth == wanted)


def _of(groups: Iterable[_Group], family: Family, written: Iterable[str]) -> list[_Group]:
    """Those whose name in the original is one of the templates."""
    templates = {t for one in written for t in templates_of(family, one)}
    return [g for g in groups if g.place.row.names["original"][0].template in templates]


def _whole(groups: Iterable[_Group], templates: Iterable[str]) -> list[_Group]:
    """Those that are all of one tensor of the original, called as one of the templates."""
    names = {*templates}
    return [
        g for g in groups for n in g.place.holders("original")
        if n.template in names and (n.first, n.stop) == (g.place.first, g.place.stop)
    ]  # fmt: skip


def _depth(prefix: str, groups: Iterable[_Group]) -> int:
    """How many blocks there are of a kind, by the largest of the prefix's last number."""
    pattern = re.compile(re.escape(prefix).replace(re.escape("{n}"), r"(\d+)") + r"(\.|$)")
    found = (pattern.match(group.place.original[0]) for group in groups)
    return max((int(m[m.re.groups - 1]) + 1 for m in found if m), default=0)
