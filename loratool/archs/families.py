"""Families of image and video models: what a name stands for, and which family a file is of.

`places` looks a module up; `family_of` tells the family of an adapter or a base by its names,
shapes and metadata.  A family is one file of ``data/families/``: see docs/adding_a_family.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

from loratool.archs.base import load_data
from loratool.archs.family_files import families, templates_of
from loratool.archs.family_rows import Family
from loratool.archs.places import Place, find_one, places

__all__ = ["Family", "Guess", "Place", "families", "family_of", "module_shapes", "places"]

_KEYS = ("ss_base_model_version", "modelspec.architecture")
_ENOUGH = 0.8  # of the names of a file are the family's
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Guess:
    """What a file is of.

    Attributes:
        family: its name, None = unknown.
        title: for people, with the size: ``FLUX.2 klein-4B``; "" where it is unknown.
        size: label of the size, "" if the family has one only or it could not be told.
        told: by what: ``names and shapes``, ``names`` (where shapes fit none of the known sizes),
            ``metadata``; "" where it is unknown.
        others: families that it may as well be.
        parts: text encoders in the file: component -> name of their family.
    """

    family: str | None = None
    title: str = ""
    size: str = ""
    told: str = ""
    others: tuple[str, ...] = ()
    parts: Mapping[str, str] = field(default_factory=dict)


class _Hit(NamedTuple):
    place: Place
    shape: Shape


class _Score(NamedTuple):
    """How well a family explains a file; larger is better."""

    size: int
    rank: int
    label: str


def family_of(modules: Mapping[str, Shape], metadata: Mapping[str, str] | None = None) -> Guess:
    """The family of an adapter's modules, or of a base's.

    Args:
        modules: name -> (out, in, …) of the change or the weight, () where it is not known.  Names
            are flat or dotted, in neutral form (``unet.double_blocks_0_img_attn_qkv``) or with the
            prefixes that files have.
        metadata: of the file.

    Returns:
        A guess; ``family`` is None if no family, or no single one, explains the names.

    Example:
        >>> family_of({"unet.single_blocks_0_linear1": (27648, 3072)}).title
        'FLUX.2 klein-4B'
    """
    texts: dict[tuple[str, str], Shape] = {}
    names: dict[tuple[str, str], Shape] = {}
    for name, shape in modules.items():
        component, rest = split_component(name)
        (texts if component.startswith("te") else names)[component, rest] = shape
    parts = {c: f for c in dict.fromkeys(c for c, _ in texts) if (f := _text_family(c, texts))}
    hits = _hits(names)
    stated, label = _stated(metadata or {})
    fit = {f: score for f, found in hits.items()
           if len(found) >= _ENOUGH * len(names) and (score := _score(f, found))}  # fmt: skip
    if stated and (stated in fit or len(hits.get(stated, ())) >= _ENOUGH * max(1, len(names))):
        known = fit.get(stated)
        return _guess(stated, label or (known.label if known else ""), "metadata", (), parts)
    most = max((len(hits[f]) for f in fit), default=0)
    fit = {f: s for f, s in fit.items() if len(hits[f]) == most and s.rank < _LAST}
    if not fit:
        return Guess(parts=parts)
    best = max(s.size for s in fit.values())
    first = min(s.rank for s in fit.values() if s.size == best)
    chosen = [f for f, s in fit.items() if s.size == best and s.rank == first]
    others = tuple(f for f in fit if f not in chosen)
    if len(chosen) > 1:
        return Guess(others=(*chosen, *others), parts=parts)
    told = "names and shapes" if best else "names"
    return _guess(chosen[0], fit[chosen[0]].label, told, others, parts)


def module_shapes(tensors: Iterable[tuple[str, Shape]]) -> dict[str, Shape]:
    """Modules of a base for `family_of`: its weights, by the names of their modules."""
    return {n.removesuffix(".weight"): shape for n, shape in tensors if not n.endswith(".bias")}


@cache
def _components() -> tuple[tuple[str, str], ...]:
    """(prefix, component), the longest prefix first."""
    parts = load_data("diffusion")["components"].items()
    found = {prefix: name for name, some in reversed(parts) for prefix in some}
    found |= {f"{name}.": name for name, _ in parts}
    return tuple(sorted(found.items(), key=lambda pair: -len(pair[0])))


def split_component(name: str) -> tuple[str, str]:
    """(component, rest) of a name; "" for the component where nothing tells it."""
    for prefix, component in _components():
        if name.startswith(prefix):
            return component, name.removeprefix(prefix)
    return "", name


_LAST = 9  # the rank of what only metadata can tell


def _hits(names: Mapping[tuple[str, str], Shape]) -> dict[str, list[_Hit]]:
    """Family -> its modules among the names."""
    found: dict[str, list[_Hit]] = {}
    for (component, name), shape in names.items():
        once: dict[str, Place] = {}
        for place in find_one(component, name):
            if place.row.component == "unet":
                once.setdefault(place.family, place)
        for family, place in once.items():
            found.setdefault(family, []).append(_Hit(place, shape))
    return found


def _text_family(component: str, texts: Mapping[tuple[str, str], Shape]) -> str:
    """The family of a text encoder, "" if unknown."""
    names = {key: shape for key, shape in texts.items() if key[0] == component}
    found: dict[str, list[_Hit]] = {}
    for (_, name), shape in names.items():
        for family, place in {p.family: p for p in find_one("te", name)}.items():
            found.setdefault(family, []).append(_Hit(place, shape))
    scores = {f: s for f, hits in found.items()
              if len(hits) >= _ENOUGH * len(names) and (s := _score(f, hits))}  # fmt: skip
    best = max((s.size for s in scores.values()), default=0)
    chosen = [f for f, s in scores.items() if s.size == best]
    return chosen[0] if len(chosen) == 1 else ""


def _stated(metadata: Mapping[str, str]) -> tuple[str, str]:
    """(family, size) that the metadata name, "" for what they do not."""
    values = _versions()
    for key in _KEYS:
        text = metadata.get(key, "").lower().strip().split("/")[0]
        while text:
            if text in values:
                return values[text]
            text = re.sub(r"[^-_.]*$", "", text[:-1] if text[-1] in "-_." else text).rstrip("-_.")
    return "", ""


@cache
def _versions() -> Mapping[str, tuple[str, str]]:
    return {
        version.lower(): (family.name, label)
        for family in families().values()
        for version, label in family.versions.items()
    }


def _score(name: str, hits: list[_Hit]) -> _Score | None:
    """How well the shapes and depths agree with a family's; None if they contradict it."""
    family = families()[name]
    tells = family.tells
    for template, ratio in tells.get("ratio", {}).items():
        wanted = templates_of(family, template)
        for hit in _of(hits, wanted):
            rows, *cols = hit.shape or (0,)
            if cols and not hit.place.is_part and rows != ratio * cols[0]:
                return None
    needs = [t for written in tells.get("needs", ()) for t in templates_of(family, written)]
    rank = _LAST if needs and not any(True for _ in _of(hits, needs)) else tells.get("rank", 0)
    widths = [t for written in tells.get("width", ()) for t in templates_of(family, written)]
    width = {h.shape[1] for h in _of(hits, widths) if len(h.shape) > 1}
    depth = [_depth(prefix, hits) for prefix in tells.get("depth", ())]
    best, label = 0, ""
    for each, size in tells.get("sizes", {}).items():
        if (fit := _fits(size, width, depth)) > best:
            best, label = fit, each
    return _Score(best, rank, label)


def _fits(size: Mapping[str, Any], width: set[int], depth: list[int]) -> int:
    """0 if a size is not that of the modules; more for all that agrees."""
    if width != {size.get("width")}:
        return 0
    wanted: list[int] = size.get("depth", [0] * len(depth))
    if any(seen > most > 0 for seen, most in zip(depth, wanted, strict=True)):
        return 0
    return 2 + sum(seen == most > 0 for seen, most in zip(depth, wanted, strict=True))


def _of(hits: Iterable[_Hit], templates: list[str]) -> Iterator[_Hit]:
    return (hit for hit in hits if hit.place.row.names["original"][0].template in templates)


def _depth(prefix: str, hits: Iterable[_Hit]) -> int:
    """How many blocks there are of a kind, by the largest number."""
    pattern = re.compile(re.escape(prefix).replace(re.escape("{n}"), r"(\d+)") + r"(\.|$)")
    found = (pattern.match(hit.place.original[0]) for hit in hits)
    return max((int(m[1]) + 1 for m in found if m), default=0)


def _guess(
    name: str, size: str, told: str, others: tuple[str, ...], parts: Mapping[str, str]
) -> Guess:
    title = families()[name].title
    return Guess(name, f"{title} {size}".strip(), size, told, others, parts)
