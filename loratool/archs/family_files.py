"""The maps of image and video models as data: one file per family in ``data/families/``.

A row pairs what the original code and what diffusers call the same weights.  Names are templates:
``{n}`` is a number, ``{q|k}`` one of some words (the first word of one side belongs to the first of
the other), ``<set>`` one of the pairs of a set.  docs/adding_a_family.md tells the whole form.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from loratool.archs.family_rows import NUMBER, Family, Index, Name, Numbers, Row
from loratool.lazy import regex
from loratool.report.text import plural

_CHOICE = regex(r"\{([^{}]*\|[^{}]*)\}")
_SET = regex(r"<(\w+)>")
FOLDER = Path(__file__).parent / "data" / "families"


@cache
def families() -> Mapping[str, Family]:
    """All families by their names."""
    return {p.stem: load(p.stem) for p in sorted(FOLDER.glob("*.json"))}


@cache
def index_of(family: str | None = None) -> Index:
    """The names of one family, or of all."""
    index = Index()
    for one in families().values() if family is None else (families()[family],):
        for row in one.rows:
            index.put(row)
    return index


@cache
def _content(name: str) -> Mapping[str, Any]:
    data = json.loads((FOLDER / f"{name}.json").read_text("utf-8"))
    assert isinstance(data, dict)
    if "like" not in data:
        return data
    other = _content(data["like"])
    joined = {"kin": data["like"], **other, **data}
    for key in ("modules", "tensors"):
        rows = [r for r in other.get(key, ()) if r not in data.get("without", ())]
        joined[key] = [*rows, *data.get(key, ())]
    for key in ("sets", "namings"):
        joined[key] = {**other.get(key, {}), **data.get(key, {})}
    return joined


def load(name: str) -> Family:
    """A family from its file.

    Raises:
        ValueError: a row whose sides do not fit together.
    """
    data = _content(name)
    component = data.get("component", "unet")
    rows = [
        row
        for key in ("modules", "tensors")
        for written in data.get(key, ())
        for row in _rows(name, written, data, is_tensor=key == "tensors")
    ]
    return Family(name, data["title"], component, tuple(rows), data.get("tells", {}),
                  data.get("versions", {}), data.get("written", ""),
                  data.get("flat") or data.get("written") or "original",
                  data.get("kin", name), tuple(data.get("encoders", ())),
                  data.get("part", "transformer"))  # fmt: skip


@cache
def _templates(name: str, written: str) -> list[str]:
    expanded = _expanded({"original": [written]}, _content(name).get("sets", {}))
    return [sides["original"][0] for sides, _ in expanded]


def templates_of(family: Family, written: str) -> list[str]:
    """The templates of the original's names that words and sets in one stand for."""
    return _templates(family.name, written)


def _rows(family: str, written: Any, data: Mapping[str, Any], *, is_tensor: bool) -> Iterator[Row]:
    """The rows that one entry of a file stands for."""
    component = data.get("component", "unet")
    if isinstance(written, str):
        written = [written, written]
    if not isinstance(written, dict):
        written = dict(zip(("original", "diffusers", "split"), written, strict=False))
    own = dict(written.get("also", {}))
    templates: dict[str, list[str]] = {
        naming: [side] if isinstance(side, str) else list(side)
        for naming, side in (("original", written["original"]),
                             ("diffusers", written["diffusers"]), *own.items())
    }  # fmt: skip
    split = tuple(written.get("split", "").split())
    parts = len(split) or max(len(t) for t in templates.values())
    covers = {naming: _covers(t, parts) for naming, t in templates.items()}
    split, namings = split or ("*",) * parts, data.get("namings", {})
    swap, lower = written.get("swap", ""), written.get("lower", "")
    for filled, blocks in _expanded(templates, data.get("sets", {})):
        names = {
            naming: tuple(map(Name, filled[naming], *zip(*covers[naming], strict=True)))
            for naming in filled
        }
        like = _further(names, namings, parts, is_tensor=is_tensor) | ({lower} if lower else set())
        yield Row(family, component, names, parts, split, swap, like, is_tensor,
                  written.get("grows", ""), written.get("columns", 0), lower, blocks)  # fmt: skip


def _covers(templates: list[str], parts: int) -> list[tuple[int, int]]:
    """Which parts each name holds: ``name:0-3`` says so, else all or one each."""
    if len(templates) == 1:
        name, colon, span = templates[0].partition(":")
        templates[0] = name
        first, _, stop = span.partition("-")
        return [(int(first), int(stop)) if colon else (0, parts)]
    if len(templates) != parts:
        raise ValueError(f"{templates}: {plural(len(templates), 'name')} for {parts} parts")
    return [(i, i + 1) for i in range(parts)]


_Sides = Mapping[str, list[str]]
_Blocks = tuple[tuple[Numbers, Numbers], ...]


def _expanded(
    templates: _Sides, sets: Mapping[str, Any]
) -> Iterator[tuple[dict[str, list[str]], _Blocks]]:
    """Words and sets filled in, side by side in all namings.

    The pairs of a set that differ in their numbers alone make one row: the numbers are its blocks.
    """
    used = {s for side in templates.values() for t in side for s in _SET.findall(t)}
    if not used:
        yield from ((sides, ()) for sides in _chosen(templates))
        return
    (name,) = used
    shapes: dict[tuple[str, str], list[tuple[Numbers, Numbers]]] = {}
    for one, other in sets[name]:
        shape = NUMBER.sub("{n}", one), NUMBER.sub("{n}", other)
        pair = tuple(NUMBER.findall(one)), tuple(NUMBER.findall(other))
        shapes.setdefault(shape, []).append(pair)
    for shape, blocks in shapes.items():
        sides = {
            naming: [t.replace(f"<{name}>", shape[naming == "diffusers"]) for t in side]
            for naming, side in templates.items()
        }
        yield from ((filled, tuple(blocks)) for filled in _chosen(sides))


def _chosen(sides: _Sides) -> Iterator[dict[str, list[str]]]:
    groups = {
        tuple(len(m.split("|")) for m in _CHOICE.findall(t))
        for side in sides.values()
        for t in side
    }
    if len(groups) != 1:
        raise ValueError(f"the sides of a row have different choices: {dict(sides)}")
    for picks in product(*map(range, groups.pop())):
        yield {naming: [_pick(t, picks) for t in side] for naming, side in sides.items()}


def _pick(template: str, picks: Sequence[int]) -> str:
    left = iter(picks)
    return _CHOICE.sub(lambda m: m[1].split("|")[next(left)], template)


def _further(
    names: dict[str, tuple[Name, ...]], namings: Mapping[str, Any], parts: int, *, is_tensor: bool
) -> frozenset[str]:
    """Add the names that replacements make, and the members of a fused module.

    Returns:
        The namings that are like diffusers'.
    """
    like, whole = {"diffusers"}, names["original"][0]
    for naming, rule in namings.items():
        source = rule.get("of", "original")
        made = tuple(
            Name(_replaced(name.template, rule["replace"]), name.first, name.stop)
            for name in names.get(source, ())
        )
        if made and made != names[source]:
            names[naming] = made
            like |= {naming} if source in like else set()
    if parts > 1 and len(names["original"]) == 1 and not is_tensor:
        names["members"] = tuple(Name(f"{whole.template}.{i}", i, i + 1) for i in range(parts))
    return frozenset(like)


def _replaced(template: str, pairs: Sequence[Sequence[str]]) -> str:
    for before, after in pairs:
        if before.startswith("^"):
            if template.startswith(before[1:]):
                template = after + template.removeprefix(before[1:])
        else:
            template = template.replace(before, after)
    return template
