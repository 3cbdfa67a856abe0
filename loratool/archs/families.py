"""Families of image and video models: what a name stands for, and which family a file is of.

`places` looks a module up; `family_of` tells the family of an adapter or a base by its names,
shapes and metadata.  A family is one file of ``data/families/``: see docs/adding_a_family.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache
from itertools import zip_longest
from typing import Any, NamedTuple

from loratool.archs.family_files import families, index_of, templates_of
from loratool.archs.family_rows import NUMBER, Family, Row, Telling, flatten
from loratool.archs.places import Place, is_text, places, places_of, split_component
from loratool.frozen import Frozen, field
from loratool.lazy import regex

__all__ = [
    "Family",
    "Guess",
    "Place",
    "block_depths",
    "families",
    "family_of",
    "growing",
    "height_ratio",
    "module_shapes",
    "places",
    "split_component",
]

_KEYS = ("ss_base_model_version", "modelspec.architecture")
_ENOUGH = 0.8  # of the names of a file are the family's
_LANGUAGE = regex(
    r"(base_model\.model\.)?(model\.|language_model\.)*layers\.\d+\.(self_attn|mlp)\.\w+(\.|$)"
)
"""What modules of language models are called, and by themselves none of another family."""
Shape = tuple[int, ...]


class Guess(Frozen):
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


class _Group(NamedTuple):
    """Modules of one name but for the numbers that do not tell rows apart.

    Attributes:
        place: of the name with the largest numbers.
        total: how many they are.
        shapes: all of theirs.
    """

    place: Place
    total: int
    shapes: frozenset[Shape]


class _Score(NamedTuple):
    """How well a family explains a file; larger is better."""

    size: int
    rank: int
    label: str
    total: int = 0


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
    if is_language(modules) and not any(map((metadata or {}).get, _KEYS)):
        return Guess()  # most files by far, and no map is read for them
    files: dict[str, dict[str, Shape]] = {}
    for name, shape in modules.items():
        component, rest = split_component(name)
        files.setdefault(component, {})[rest] = shape
    parts = {c: f for c, names in files.items() if is_text(c) and (f := _text_family(names))}
    # Beside a named denoiser, what has no name is a VAE or the like.
    homes = [c for c in files if c and not is_text(c)] or [c for c in files if not c]
    names = {n: shape for c in homes for n, shape in files[c].items()}
    fit = _fitting("unet", names)
    stated, label = _stated(metadata or {})
    if stated in fit or (stated and not names):
        label = label or (fit[stated].label if stated in fit else "")
        return _guess(stated, label, "metadata", (), parts)
    fit = {f: s for f, s in fit.items() if s.rank < _LAST}
    if not fit:
        return Guess(parts=parts)
    most = max(s.total for s in fit.values())
    fit = {f: s for f, s in fit.items() if s.total == most}
    best = max(s.size for s in fit.values())
    first = min(s.rank for s in fit.values() if s.size == best)
    chosen = [f for f, s in fit.items() if s.size == best and s.rank == first]
    others = tuple(f for f in fit if f not in chosen)
    if len(chosen) > 1:
        return Guess(others=(*chosen, *others), parts=parts)
    told = "names and shapes" if best else "names"
    return _guess(chosen[0], fit[chosen[0]].label, told, others, parts)


def is_language(modules: Iterable[str]) -> bool:
    """True if all of these modules are called as a language model's."""
    return all(map(_LANGUAGE.match, modules))


def module_shapes(tensors: Iterable[tuple[str, Shape]]) -> dict[str, Shape]:
    """Modules of a base for `family_of`: its weights, by the names of their modules."""
    return {n.removesuffix(".weight"): shape for n, shape in tensors if not n.endswith(".bias")}


def growing(tensor: str) -> Mapping[str, str]:
    """Families in which a weight may get more columns -> the key that states how many it has.

    Example:
        >>> dict(growing("transformer.x_embedder.weight"))
        {'flux1': 'in_channels'}
    """
    component, module = split_component(tensor.removesuffix(".weight"))
    return {p.family: p.row.grows for p in places(component, module) if p.row.grows}


def height_ratio(row: Row) -> int:
    """How many times as many rows as columns the weights of a row have, 0 where it is not known.

    Example:
        >>> height_ratio(places("unet", "single_blocks.0.linear1", family="flux1")[0].row)
        7
    """
    family = families()[row.family]
    ratios: Mapping[str, int] = family.tells.get("ratio", {})
    mine = row.names["original"][0].template
    return next((n for one, n in ratios.items() if mine in templates_of(family, one)), 0)


def block_depths(family: str, *kinds: str) -> set[tuple[int, ...]]:
    """How many blocks the known sizes of a family have, if it has blocks of these kinds.

    Example:
        >>> block_depths("flux1", "double_blocks", "single_blocks")
        {(19, 38)}
    """
    tells = families()[family].tells
    if tells.get("depth") != [f"{kind}.{{n}}" for kind in kinds]:
        return set()
    return {tuple(size["depth"]) for size in tells["sizes"].values()}


_LAST = 9  # the rank of what only metadata can tell


def _fitting(component: str, names: Mapping[str, Shape]) -> dict[str, _Score]:
    """Families that most of the names and all shapes agree with."""
    fit: dict[str, _Score] = {}
    for family, groups in _groups(component, names).items():
        total = sum(group.total for group in groups)
        if total >= _ENOUGH * len(names) and (score := _score(family, groups)):
            fit[family] = score._replace(total=total)
    return fit


def _groups(component: str, names: Mapping[str, Shape]) -> dict[str, list[_Group]]:
    """Family -> its modules among the names, each kind of module looked up once."""
    index = index_of()
    known: dict[str, Telling | None] = {}
    pools: dict[tuple[str, tuple[str, ...]], tuple[list[Shape], list[list[str]]]] = {}
    for name, shape in names.items():
        flat = flatten(name).strip("_")
        key, numbers = NUMBER.sub("#", flat), NUMBER.findall(flat)
        if key not in known:
            known[key] = index.telling(key)
        telling = known[key]
        if telling is not None and (
            not telling.length or tuple(numbers[: telling.length]) in telling.blocks
        ):
            pool = pools.setdefault((key, tuple([numbers[i] for i in telling.places])), ([], []))
            pool[0].append(shape)
            pool[1].append(numbers)
    found: dict[str, list[_Group]] = {}
    for (key, _), (shapes, all_numbers) in pools.items():
        largest = [max(column, key=int) for column in zip(*all_numbers, strict=True)]
        telling = known[key]
        block = all_numbers[0][: telling.length] if telling else []
        largest[: len(block)] = block
        name = "".join(w + n for w, n in zip_longest(key.split("#"), largest, fillvalue=""))
        once: dict[str, Place] = {}
        for place in places_of(component, name):
            once.setdefault(place.family, place)
        for family, place in once.items():
            group = _Group(place, len(shapes), frozenset(shapes))
            found.setdefault(family, []).append(group)
    return found


def _text_family(names: Mapping[str, Shape]) -> str:
    """The family of a text encoder, "" if unknown."""
    scores = _fitting("te", names)
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
            text = re.sub(r"[-_.]?[^-_.]*$", "", text, count=1)
    return "", ""


@cache
def _versions() -> Mapping[str, tuple[str, str]]:
    return {
        version.lower(): (family.name, label)
        for family in families().values()
        for version, label in family.versions.items()
    }


def _score(name: str, groups: list[_Group]) -> _Score | None:
    """How well the shapes and depths agree with a family's; None if they contradict it."""
    family = families()[name]
    tells = family.tells
    for template, ratio in tells.get("ratio", {}).items():
        for group in _of(groups, family, [template]):
            shapes = [s for s in group.shapes if len(s) > 1 and not group.place.is_part]
            if any(shape[0] != ratio * shape[1] for shape in shapes):
                return None
    needs = tells.get("needs", ())
    rank = _LAST if needs and not _of(groups, family, needs) else tells.get("rank", 0)
    wide = _of(groups, family, tells.get("width", ()))
    width = {shape[1] for group in wide for shape in group.shapes if len(shape) > 1}
    depth = [_depth(prefix, groups) for prefix in tells.get("depth", ())]
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


def _of(groups: Iterable[_Group], family: Family, written: Iterable[str]) -> list[_Group]:
    """Those whose name in the original is one of the templates."""
    templates = {t for one in written for t in templates_of(family, one)}
    return [g for g in groups if g.place.row.names["original"][0].template in templates]


def _depth(prefix: str, groups: Iterable[_Group]) -> int:
    """How many blocks there are of a kind, by the largest of the prefix's last number."""
    pattern = re.compile(re.escape(prefix).replace(re.escape("{n}"), r"(\d+)") + r"(\.|$)")
    found = (pattern.match(group.place.original[0]) for group in groups)
    return max((int(m[m.re.groups - 1]) + 1 for m in found if m), default=0)


def _guess(
    name: str, size: str, told: str, others: tuple[str, ...], parts: Mapping[str, str]
) -> Guess:
    title = families()[name].title
    return Guess(name, f"{title} {size}".strip(), size, told, others, parts)
