"""Which weights does a module's name stand for, and what do other programs call them?

`places` is the one look-up of names of image and video models: flat or dotted, of any trainer, with
or without the prefix of its component.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache

from loratool.archs.base import load_data
from loratool.archs.family_files import index_of
from loratool.archs.family_rows import Entry, Name, Row, cut, flatten, holds_for
from loratool.frozen import Frozen


class Place(Frozen):
    """Weights of a family, as one name stands for them.

    Attributes:
        row: of the family's map.
        numbers: of blocks and layers, as the original has them.
        naming: whose name it was: ``original``, ``diffusers`` or another one of the family.
        first: the first of the row's parts that the name holds.
        stop: the one behind the last.
        parameter: ``weight``, ``bias``; "" where the names are those of whole tensors (parameters
            without a module, norms that are called otherwise).

    Example:
        >>> (place,) = places("unet", "single_blocks_7_linear1", family="flux1")
        >>> place.original
        ('single_blocks.7.linear1',)
        >>> place.diffusers[3], place.split(21504, 3072)[3]
        ('single_transformer_blocks.7.proj_mlp', (9216, 21504))
    """

    row: Row
    numbers: tuple[str, ...]
    naming: str
    first: int
    stop: int
    parameter: str

    @property
    def family(self) -> str:
        """Name of the family."""
        return self.row.family

    @property
    def original(self) -> tuple[str, ...]:
        """What the original code calls these parts: usually one name."""
        return self.names("original")

    @property
    def diffusers(self) -> tuple[str, ...]:
        """What diffusers (transformers for text encoders) calls them, in the order of rows."""
        return self.names("diffusers")

    @property
    def namings(self) -> tuple[str, ...]:
        """Every naming that has names for them."""
        return tuple(self.row.names)

    def names(self, naming: str) -> tuple[str, ...]:
        """Names of the modules (of tensors, if `is_tensor`) that hold any of these parts.

        Raises:
            KeyError: the family has no such naming for them.
        """
        return tuple(self.row.fill(name, naming, self.numbers) for name in self.holders(naming))

    def holders(self, naming: str) -> tuple[Name, ...]:
        """The same with the parts that each of them holds."""
        names = self.row.names[naming]
        return tuple(n for n in names if n.first < self.stop and self.first < n.stop)

    def tensors(self, naming: str) -> tuple[str, ...]:
        """Full names of the tensors of `names` in a base, behind the prefix of their component."""
        end = f".{self.parameter}" if self.parameter else ""
        return tuple(name + end for name in self.names(naming))

    @property
    def is_tensor(self) -> bool:
        """True if the names are those of whole tensors."""
        return self.row.is_tensor

    @property
    def is_part(self) -> bool:
        """True if the name holds only some of the parts of the row."""
        return self.stop - self.first < self.row.parts

    @property
    def index(self) -> int:
        """Which part it is, 0 for the first or for all of them."""
        return self.first

    def called(self, naming: str, rows: int, columns: int) -> str:
        """The naming that stands for a program's: its own, that of low weights, or the original.

        Args:
            naming: of the program.
            rows: of the weight, and
            columns: its columns.
        """
        if naming == "diffusers" and self.row.lower and rows < columns:
            return self.row.lower
        return naming if naming in self.row.names else "original"

    def split(self, rows: int, in_width: int | None = None) -> list[tuple[int, int]]:
        """Rows (start, stop) of each part of the whole row's weights.

        Args:
            rows: of all parts together.
            in_width: columns of the weight; needed only if parts are as high as it is wide.

        Raises:
            ValueError: they cannot be cut so.
        """
        return cut(self.row.split, rows, in_width)

    def is_turned(self, naming: str) -> bool:
        """True if a naming has the halves of the rows in the other order (see `Row.swap`)."""
        like = self.row.like_diffusers
        return bool(self.row.swap) and (naming in like) != (self.naming in like)

    def is_swapped(self, naming: str, rows: int = 0, in_width: int = 0) -> bool:
        """True if the halves of the rows change places on the way into a naming.

        Args:
            naming: into which, from the one that the name is of.
            rows: of the weight, and
            in_width: its columns: some families swap only in their last block, told by both.
        """
        return self.is_turned(naming) and holds_for(self.row.swap, rows, in_width)

    def asks_width(self, naming: str) -> bool:
        """True if only the weight's columns tell its name in a naming, or how it lies there."""
        is_lower = bool(self.row.lower) and naming == "diffusers" and self.naming == "original"
        return is_lower or (self.row.swap == "2in" and self.is_turned(naming))


def places(
    component: str, module: str, parameter: str = "weight", family: str | None = None
) -> list[Place]:
    """Everything that a module's name may stand for, one place per family and row.

    Args:
        component: part of the pipeline: a key of `diffusion.json` (unet, transformer, te1 …),
            "" = any.
        module: flat or dotted, with or without a prefix such as ``diffusion_model.``; also the
            whole name of a parameter without a module (``blocks.0.modulation``).
        parameter: of it.
        family: of this one only; None = of all.

    Returns:
        None, one, or several: two families may have the same name for different things.

    Example:
        >>> places("unet", "single_transformer_blocks.0.proj_out", family="flux1")[0].original
        ('single_blocks.0.linear2',)
    """
    for one in _stripped(module):
        if found := list(_find(component, one, parameter, family)):
            return found
    return []


def _find(component: str, module: str, parameter: str, family: str | None) -> Iterator[Place]:
    flat, index, kind = flatten(module), index_of(family), "te" if is_text(component) else "unet"

    def ask(name: str, *, is_tensor: bool) -> Iterator[Place]:
        for entry, numbers in index.find(name, is_tensor=is_tensor):
            if not component or kind == entry.row.component:
                yield _place(entry, numbers, "" if is_tensor else parameter)

    yield from ask(flat, is_tensor=False)
    if index.tensors:
        whole = "_".join(filter(None, (flat, parameter))) if parameter else ""
        found = list(ask(whole, is_tensor=True)) if whole else []
        if not found and parameter in ("", "weight"):  # the name is that of the parameter itself
            found = list(ask(flat, is_tensor=True))
        yield from found


def _place(entry: Entry, numbers: tuple[str, ...], parameter: str) -> Place:
    name = entry.name
    return Place(entry.row, numbers, entry.naming, name.first, name.stop, parameter)


def places_of(component: str, flat: str) -> list[Place]:
    """The places of a flat name, without a prefix: of a module, or of a whole tensor."""
    return list(_find(component, flat, "weight", None))


def is_text(component: str) -> bool:
    """True for the components of text encoders."""
    return component.startswith("te") or component.endswith("_te")


def _stripped(module: str) -> Iterator[str]:
    """The name, without an underscore too many, and without prefixes of components."""
    yield module
    bare = module.strip("_")
    if bare != module:
        yield bare
    for prefix in prefixes():
        if bare.startswith(prefix):
            yield from _stripped(bare.removeprefix(prefix))


def split_component(name: str) -> tuple[str, str]:
    """(component, rest) of a module's name; "" for the component where nothing tells it.

    Example:
        >>> split_component("te1.text_model_encoder_layers_0_mlp_fc1")
        ('te1', 'text_model_encoder_layers_0_mlp_fc1')
        >>> split_component("model.diffusion_model.img_in")
        ('unet', 'img_in')
    """
    by_prefix, pattern = _components()
    found = pattern.match(name)
    return (by_prefix[found[0]], name[found.end() :]) if found else ("", name)


@cache
def _components() -> tuple[Mapping[str, str], re.Pattern[str]]:
    """Component by prefix, and what finds the longest prefix."""
    data = load_data("diffusion")
    parts = data["components"]
    found = {f"{name}.": name for name in parts}
    found |= {prefix: name for name, some in reversed(parts.items()) for prefix in some}
    found |= data["told"]
    longest = sorted(found, key=lambda prefix: -len(prefix))
    return found, re.compile("|".join(map(re.escape, longest)))


@cache
def prefixes() -> tuple[str, ...]:
    """What names of tensors may begin with before their component's own."""
    parts = load_data("diffusion")["components"].values()
    return tuple(dict.fromkeys(p for some in parts for p in some))
