"""Families of image and video models: what a name stands for, and which family a file is of.

`places` looks a module up; `family_of` tells the family of an adapter or a base by its names,
shapes and metadata.  A family is one file of ``data/families/``: see docs/adding_a_family.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache, lru_cache

from loratool.archs.family_files import families, templates_of
from loratool.archs.family_fit import LAST, Shape, fitting
from loratool.archs.family_rows import Family, Row, flatten
from loratool.archs.places import Place, is_text, places, split_component
from loratool.frozen import Frozen, field
from loratool.lazy import regex

__all__ = [
    "MODEL_KEY",
    "Family",
    "Guess",
    "Place",
    "block_depths",
    "families",
    "family_of",
    "flatten",
    "growing",
    "height_ratio",
    "module_shapes",
    "places",
    "split_component",
]

MODEL_KEY = "ss_base_model_version"
"""Of trainers' metadata: which model a file is for."""
_KEYS = (MODEL_KEY, "modelspec.architecture")
_LANGUAGE = regex(
    r"(base_model\.model\.)?(model\.|language_model\.)*layers\.\d+\.(self_attn|mlp)\.\w+(\.|$)"
)
"""What modules of language models are called, and by themselves none of another family."""


class Guess(Frozen):
    """What a file is of.

    Attributes:
        family: its name, None = unknown.
        title: for people, with the size: ``FLUX.2 klein-4B``; of several that names and shapes fit
            equally all: ``Wan 14B or Helios``; "" where it is unknown.
        size: label of the size, "" if the family has one only or it could not be told.
        told: by what: ``names and shapes``, ``names`` (where shapes fit none of the known sizes),
            ``metadata``; "" where it is unknown.
        others: families that it may as well be; where one is told, those that explain less.
        parts: text encoders in the file: component -> name of their family.
    """

    family: str | None = None
    title: str = ""
    size: str = ""
    told: str = ""
    others: tuple[str, ...] = ()
    parts: Mapping[str, str] = field(default_factory=dict)


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
    stated = tuple((key, text) for key in _KEYS if (text := (metadata or {}).get(key)))
    return _family_of(tuple(modules.items()), stated)


@lru_cache(maxsize=32)  # files of one model by the hundred, each asked by several programs
def _family_of(items: tuple[tuple[str, Shape], ...], stated: tuple[tuple[str, str], ...]) -> Guess:
    modules, metadata = dict(items), dict(stated)
    if is_language(modules) and not metadata:
        return Guess()  # most files by far, and no map is read for them
    files: dict[str, dict[str, Shape]] = {}
    for name, shape in modules.items():
        component, rest = split_component(name)
        files.setdefault(component, {})[rest] = shape
    parts = {c: f for c, names in files.items() if is_text(c) and (f := _text_family(names))}
    # Beside a named denoiser, what has no name is a VAE or the like.
    homes = [c for c in files if c and not is_text(c)] or [c for c in files if not c]
    names = {n: shape for c in homes for n, shape in files[c].items()}
    fit = fitting("unet", names)
    said, label = _stated(metadata)
    if said in fit or (said and not names):
        label = label or (fit[said].label if said in fit else "")
        return _guess(said, label, "metadata", (), parts)
    fit = {family: one for family, one in fit.items() if one.rank < LAST}
    best = max((one.order for one in fit.values()), default=())
    chosen = tuple(family for family, one in fit.items() if one.order == best)
    if len(chosen) != 1:
        return Guess(others=chosen, parts=parts)
    (family,) = chosen
    others = tuple(f for f, one in fit.items() if one.total == best[0] and f != family)
    if not fit[family].size:
        return _guess(family, "", "names", others, parts)
    last = fit[family].rank + 1
    alike = {f: one.label for f, one in fit.items()
             if one.order[:-1] == best[:-1] and one.rank <= last and f != family}  # fmt: skip
    return _guess(family, fit[family].label, "names and shapes", others, parts, alike)


def is_language(modules: Iterable[str]) -> bool:
    """True if all of these modules are called as a language model's."""
    return all(map(_LANGUAGE.match, modules))


def module_shapes(tensors: Iterable[tuple[str, Shape]]) -> dict[str, Shape]:
    """Modules of a base for `family_of`: its weights, by the names of their modules.

    What lies beside a weight, such as the factors of its codes (``scale_weight``), tells nothing.
    """
    shapes = dict(tensors)
    return {
        name.removesuffix(".weight"): shape for name, shape in shapes.items()
        if name.endswith(".weight")
        or not (name.endswith(".bias") or f"{_owner(name)}.weight" in shapes)
    }  # fmt: skip


def _owner(name: str) -> str:
    """The module of a tensor, also of ``X.weight.absmax``."""
    return name.rpartition(".")[0].removesuffix(".weight")


def growing(tensor: str) -> Mapping[str, str]:
    """Families in which a weight may get more columns -> the key that states how many it has.

    Example:
        >>> dict(growing("transformer.x_embedder.weight"))
        {'flux1': 'in_channels', 'longcat_image': 'in_channels'}
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


def _text_family(names: Mapping[str, Shape]) -> str:
    """The family of a text encoder, "" if unknown."""
    fit = fitting("te", names)
    best = max((one.size for one in fit.values()), default=0)
    chosen = [f for f, one in fit.items() if one.size == best]
    return chosen[0] if len(chosen) == 1 else ""


def trained_as(modules: Mapping[str, Shape]) -> str:
    """What trainers' metadata call the one family that explains some modules, "" if none does.

    Args:
        modules: as of `family_of`.

    Example:
        >>> trained_as({"unet.single_blocks_0_linear1": (21504, 3072)})
        'flux1'
    """
    found = family_of(modules).family
    return next(iter(families()[found].versions), "") if found else ""


def _stated(metadata: Mapping[str, str]) -> tuple[str, str]:
    """(family, size) that the metadata name, "" for what they do not."""
    values = _versions()
    for key in _KEYS:
        text = metadata.get(key, "").lower().strip().split("/")[0]
        while text:  # flux.1-dev-fp8, flux.1-dev, flux.1, flux
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


def _guess(
    name: str,
    size: str,
    told: str,
    others: tuple[str, ...],
    parts: Mapping[str, str],
    alike: Mapping[str, str] | None = None,
) -> Guess:
    sizes = {name: size, **(alike or {})}
    titles = (f"{families()[one].title} {label}".strip() for one, label in sizes.items())
    return Guess(name, " or ".join(titles), size, told, others, parts)
