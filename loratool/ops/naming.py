"""What modules are called in another program: renamed, cut into parts and put together.

The maps of families say which weights are the same.  Where one side has as one module what the
other has apart, changes are cut and joined by `loratool.delta.stacking`; both are exact.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise

from loratool.adapter import DeltaSpec, Source
from loratool.archs.families import (
    Place,
    height_ratio,
)
from loratool.archs.family_rows import Name, cut
from loratool.delta import stacking
from loratool.delta.forms import (
    factors_of,
    shape_of,
    side_sizes,
    with_factors,
)
from loratool.dialects.arranged import arranged
from loratool.errors import MismatchError, list_some
from loratool.frozen import Frozen, replace
from loratool.kind import GROWS
from loratool.ops.locating import Located
from loratool.store.reader import have_same_bytes


class Moved(Frozen):
    """A change under its new name.

    Attributes:
        spec: module and parameter as the naming has them, without a component.
        component: that it is of.
        family: of its weights, "" if not known.
        made_of: names of the changes that it is, or is made of.
    """

    spec: DeltaSpec
    component: str
    family: str
    made_of: tuple[str, ...] = ()


def rename(
    located: Iterable[Located], naming: Callable[[str], str], remake: stacking.Remake
) -> list[Moved]:
    """Every change under the name that it has in a naming.

    Args:
        located: of `locate`.
        naming: family -> which of its namings, such as ``original`` or ``diffusers``.
        remake: of `loratool.delta.stacking.join`.

    Raises:
        MismatchError: LT-494, a change that cannot be cut or joined so; LT-417, the same weight
            changed twice.
    """
    groups: dict[object, list[Located]] = {}
    kin: dict[object, list[Located]] = {}
    for one in located:
        key: object = id(one)
        if one.place is not None:
            kin.setdefault(_kin_of(one), []).append(one)
            key = _kin_of(one), one.place.parameter
        groups.setdefault(key, []).append(one)
    made: list[Moved] = []
    for group in groups.values():
        place = group[0].place
        if place is None:
            spec = replace(group[0].spec, module=group[0].module)
            made.append(Moved(spec, group[0].component, "", (group[0].spec.name,)))
        else:
            mine = kin[_kin_of(group[0])]
            wide = max(_size(k.spec)[1] for k in mine)  # a bias does not tell it
            wanted = place.called(naming(place.family), _size(group[0].spec)[0], wide)
            if not wide and place.asks_width(wanted):
                raise _refusal([group[0].spec], "the width of its weight, which it does not tell, "
                               "decides where its numbers lie")  # fmt: skip
            made += _moved(group, wanted, _heights(mine), wide, remake)
    return made


def _kin_of(one: Located) -> object:
    """The same for the changes of all parameters of a row of the map."""
    assert one.place is not None
    return one.component, id(one.place.row), one.place.numbers


class _Piece(Frozen):
    """A change of some parts of a row of the map."""

    spec: DeltaSpec
    first: int
    stop: int
    name: str


def _moved(
    group: Sequence[Located],
    naming: str,
    heights: Mapping[int, int],
    wide: int,
    remake: stacking.Remake,
) -> list[Moved]:
    """The changes of one row of the map, in another naming."""
    place = group[0].place
    assert place is not None
    row = place.row
    pieces = [p for one in group for p in _cut(one, row.names[naming], heights)]
    made = []
    spans = [(name.first, name.stop) for name in row.names[naming]]
    if any(all(p.first < a or b < p.stop for a, b in spans) for p in pieces):
        raise _refusal([one.spec for one in group], f"the naming {naming} has not all of its parts")
    for name in row.names[naming]:
        mine = [p for p in pieces if name.first <= p.first and p.stop <= name.stop]
        if not mine:
            continue
        spec = _one(_without_twins(mine), name, heights, remake)
        spec = _grown(_turned(spec, place, naming, wide), place)
        module, parameter = row.fill(name, naming, place.numbers), place.parameter
        if row.is_tensor:
            module, _, parameter = module.rpartition(".")
        made.append(Moved(replace(spec, module=module, parameter=parameter), group[0].component,
                          place.family, tuple(p.name for p in mine)))  # fmt: skip
    return made


def _heights(kin: Sequence[Located]) -> dict[int, int]:
    """Rows of each part of a row of the map that its changes tell, and of those that follow.

    Args:
        kin: the changes of all of its parameters.
    """
    found: dict[int, int] = {}
    width = 0
    words: tuple[str, ...] = ()
    for one in sorted(kin, key=lambda k: not k.spec.is_matrix):  # vectors do not tell the width
        assert one.place is not None
        words = one.place.row.split
        rows, own = _size(one.spec)
        width = own or width
        span = words[one.place.first : one.place.stop]
        try:
            spans = cut(span if len(span) > 1 else ("*",), rows, width)
        except ValueError as problem:
            raise _refusal([one.spec], str(problem)) from None
        found |= {one.place.first + i: b - a for i, (a, b) in enumerate(spans)}
    shares = [h for part, h in found.items() if words[part] == "*"]
    share = shares[0] if shares else _share(kin[0].place, width)
    for part, word in enumerate(words):
        known = width if word == "in" else share
        if part not in found and known:
            found[part] = known
    return found


def _share(place: Place | None, width: int) -> int:
    """Rows of each part that shares what is left of a row with the others, by its family; or 0."""
    assert place is not None
    total = width * height_ratio(place.row)
    left, count = total - width * place.row.split.count("in"), place.row.split.count("*")
    return left // count if total else 0


def _size(spec: DeltaSpec) -> tuple[int, int]:
    """(rows, columns) of a change; of a vector (n, 0)."""
    if not spec.is_matrix:
        return shape_of(spec)[0], 0
    out, inner = side_sizes(spec)
    return out, inner[0]


def _cut(one: Located, names: Sequence[Name], heights: Mapping[int, int]) -> list[_Piece]:
    """The change, cut where the modules of the other naming begin and end."""
    place = one.place
    assert place is not None
    bounds = sorted({place.first, place.stop,
                     *(b for n in names for b in (n.first, n.stop)
                       if place.first < b < place.stop)})  # fmt: skip
    if len(bounds) == 2:
        return [_Piece(one.spec, place.first, place.stop, one.spec.name)]
    starts = {place.first: 0}
    for part in range(place.first, place.stop):
        starts[part + 1] = starts[part] + heights[part]
    pairs = list(pairwise(bounds))
    parts = stacking.cut(one.spec, [(starts[a], starts[b]) for a, b in pairs])
    if parts is None:
        raise _refusal([one.spec], f"a {one.spec.title} of several modules cannot be cut")
    return [_Piece(spec, a, b, one.spec.name)
            for spec, (a, b) in zip(parts, pairs, strict=True)]  # fmt: skip


def _without_twins(pieces: Sequence[_Piece]) -> list[_Piece]:
    """Each part once: a file may hold a fused module and the same change of its parts."""
    kept: list[_Piece] = []
    for one in pieces:
        twins = [k for k in kept if k.first < one.stop and one.first < k.stop]
        if not twins:
            kept.append(one)
        elif (one.first, one.stop) != (twins[0].first, twins[0].stop) or not _are_same(
            one, twins[0]
        ):
            raise MismatchError(
                "LT-417", "one weight is changed twice, as a part and as a whole",
                key=list_some([twins[0].spec.name, one.spec.name]),
                hint=f"leave one of them out: {_skip([twins[0].spec.module])}",
            )  # fmt: skip
    return sorted(kept, key=lambda p: p.first)


def _are_same(one: _Piece, other: _Piece) -> bool:
    mine, theirs = one.spec, other.spec
    return (mine.kind, mine.scaling, set(mine.fields)) == (
        theirs.kind, theirs.scaling, set(theirs.fields)
    ) and all(have_same_bytes([mine.fields[r], theirs.fields[r]]) for r in mine.fields)  # fmt: skip


def _one(
    pieces: Sequence[_Piece], name: Name, heights: Mapping[int, int], remake: stacking.Remake
) -> DeltaSpec:
    """The pieces as the change of one module."""
    if len(pieces) == 1 and (pieces[0].first, pieces[0].stop) == (name.first, name.stop):
        return pieces[0].spec
    parts: list[DeltaSpec | None] = []
    sizes: list[int] = []
    at = name.first
    specs = [p.spec for p in pieces]
    for piece in (*pieces, None):
        stop = name.stop if piece is None else piece.first
        if at < stop:  # nothing changes here
            if any(part not in heights for part in range(at, stop)):
                raise _refusal(specs, "the file does not tell how many rows the other parts have")
            parts.append(None)
            sizes.append(sum(heights[part] for part in range(at, stop)))
        if piece is not None:
            parts.append(piece.spec)
            sizes.append(shape_of(piece.spec)[0])
            at = piece.stop
    made = stacking.join(parts, sizes, remake)
    if made is None:
        raise _refusal(specs, f"{specs[0].title} changes of several modules have no common form")
    return made


def _turned(spec: DeltaSpec, place: Place, naming: str, wide: int) -> DeltaSpec:
    if place.row.swap == "axes" and place.is_turned(naming):
        return _exchanged(spec)
    if not place.is_swapped(naming, _size(spec)[0], wide):
        return spec
    made = stacking.swap_halves(spec)
    if made is None:
        raise _refusal([spec], f"the halves of a {spec.title} cannot change places")
    return made


def _exchanged(spec: DeltaSpec) -> DeltaSpec:
    """The change of the same weight where that is stored (in, out), or no longer is."""
    fields = {role: _across(source) for role, source in spec.fields.items()}
    if spec.is_pair and spec.blocks is None:
        left, right = factors_of(spec)
        return with_factors(spec, _across(right), _across(left))
    if len(spec.fields) == 1 and spec.is_matrix:
        return replace(spec, fields=fields)
    raise _refusal([spec], f"the axes of a {spec.title} cannot change places")


def _across(source: Source) -> Source:
    return arranged(source, source.shape, (1, 0))


def _grown(spec: DeltaSpec, place: Place) -> DeltaSpec:
    """A change of more columns than the family's own models have says so: the weight gets them."""
    columns = place.row.columns
    if not (columns and spec.is_matrix and side_sizes(spec)[1][0] > columns):
        return spec
    return replace(spec, settings={**spec.settings, GROWS: 1})


def _refusal(specs: Sequence[DeltaSpec], reason: str) -> MismatchError:
    return MismatchError(
        "LT-494", "a change has no form under the other names", got=reason,
        key=list_some([s.name for s in specs], 3),
        hint=f"leave it out: {_skip([s.module for s in specs])}",
    )  # fmt: skip


def _skip(modules: Iterable[str]) -> str:
    names = dict.fromkeys(f"^{re.escape(module)}$" for module in modules)
    return shlex.join(word for name in names for word in ("--skip", name))
