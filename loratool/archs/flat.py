"""Which tensors of a base does an adapter's name mean?  By look-up: nothing is un-flattened.

kohya and its kin write ``down_blocks_0_attentions_0_proj_in`` for ``down_blocks.0.attentions.0.
proj_in``; what was a dot and what an underscore cannot be told from the name.  So the names of the
base are flattened and the adapter's looked up among them; what is not there has other names in its
family (`loratool.archs.places`), and those are looked for.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cache, cached_property

from loratool.archs.base import load_data
from loratool.archs.family_files import families
from loratool.archs.places import Place, places, prefixes
from loratool.frozen import Frozen

_TEXT_MODEL = "text_model."
_BARE_TEXT = ("encoder.layers.", "embeddings.", "final_layer_norm")
_Key = tuple[str, str, str]


class Meaning(Frozen):
    """What a name stands for in a base.

    Attributes:
        names: the tensor; of a fused module on separate ones all of them, in the order of rows.
        holds: where rows must be cut: the parts (first, stop) of the whole that each tensor holds.
        wanted: the parts that the name stands for.
        split: a word for the height of every part: see `loratool.archs.family_rows.Row`.
        swap: "" or when the halves of the rows change places, or rows and columns.
    """

    names: tuple[str, ...]
    holds: tuple[tuple[int, int], ...] = ()
    wanted: tuple[int, int] = (0, 1)
    split: tuple[str, ...] = ()
    swap: str = ""


class FlatNames:
    """The names of a base as adapters spell them.

    Args:
        parts: prefix of a component -> the names of its tensors behind it; "" -> all of them.
        family: of the base, where that matters: a name may mean other things in another.
    """

    def __init__(self, parts: Mapping[str, Collection[str]], family: str | None = None) -> None:
        self._parts = parts
        self._family = family

    def look_up(self, component: str, flat: str, parameter: str) -> list[Meaning]:
        """Everything that a name may mean: none, one, or several; the base's own names first.

        Args:
            component: that it is of, a key of `diffusion.json`; "" = any.
            flat: the module; dots are as good as underscores.
            parameter: of it.
        """
        known = load_data("diffusion")["components"]
        homes = (*known.get(component, () if component else prefixes()), "")
        plain = flat.replace(".", "_")
        for spelled in dict.fromkeys((plain, plain.strip("_"))):  # some trainers add one too many
            found = [m for p in homes for m in self.own.get((p, spelled, parameter), ())]
            if found:
                return list(dict.fromkeys(found))
        elsewhere = _of_family(places(component, flat, parameter), self._family)
        return list(dict.fromkeys(m for one in elsewhere for m in self._meanings(one, homes)))

    def _meanings(self, place: Place, homes: Iterable[str]) -> Iterator[Meaning]:
        """What the base has for a place, in whichever naming."""
        for prefix in homes:
            there = self._parts.get(prefix, ())
            for naming in place.namings if there else ():
                names = place.tensors(naming)
                if names and all(name in there for name in names):
                    yield _meaning(place, naming, tuple(prefix + name for name in names))

    @cached_property
    def own(self) -> dict[_Key, list[Meaning]]:
        """(prefix, flat module, parameter) -> what it means, by the base's own names."""
        index: dict[_Key, list[Meaning]] = {}
        for prefix, names in self._parts.items():
            for name in names:
                module, _, parameter = name.rpartition(".")
                meanings = index.setdefault((prefix, module.replace(".", "_"), parameter), [])
                meanings.append(Meaning((prefix + name,)))
        return index


class KnownNames:
    """The same without a base: modules that the families know, by their dotted names.

    Args:
        family: of the adapter, where that is known: the same name may be another's too.
    """

    def __init__(self, family: str | None = None) -> None:
        self._family = family

    def look_up(self, component: str, flat: str, parameter: str) -> list[Meaning]:
        """Everything that a name may mean, as `FlatNames.look_up`; fused modules stay fused."""
        found = []
        for place in _of_family(places(component, flat, parameter), self._family):
            naming = families()[place.family].written or place.naming
            found.append(_meaning(place, naming, place.tensors(naming)))
        return list(dict.fromkeys(found))


def _of_family(found: list[Place], family: str | None) -> list[Place]:
    """Those of a family; all, if it has none of them."""
    return [place for place in found if place.family == family] or found


def _meaning(place: Place, naming: str, names: tuple[str, ...]) -> Meaning:
    row, wanted = place.row, (place.first, place.stop)
    holds = tuple((n.first, n.stop) for n in place.holders(naming))
    swap = row.swap if place.is_turned(naming) else ""
    if holds == (wanted,) and not swap:
        return Meaning(names)
    return Meaning(names, holds, wanted, row.split, swap)


def flat_names(names: Iterable[str], family: str | None = None) -> FlatNames:
    """Index the tensors of a base.

    Args:
        names: of all tensors; those of a pipeline begin with its components.
        family: of the base, where that is known and matters.

    Example:
        >>> flat_names(["unet.conv_in.weight"]).look_up("unet", "conv_in", "weight")[0].names
        ('unet.conv_in.weight',)
    """
    names = list(names)
    parts = {
        prefix: dict.fromkeys(n[len(prefix) :] for n in names if n.startswith(prefix)).keys()
        for prefix in ("", *prefixes())
    }
    return FlatNames(parts, family)


@cache
def known_names(family: str | None = None) -> KnownNames:
    """The modules of all families; of one where it and another have the same name."""
    return KnownNames(family)


def components_of(name: str) -> Iterator[tuple[str, str]]:
    """(component, prefix) of every component that a dotted name of a pipeline may belong to."""
    for component, some in load_data("diffusion")["components"].items():
        yield from ((component, prefix) for prefix in some if name.startswith(prefix))


def with_text_model(module: str) -> str:
    """A text encoder's module as programs of images look it up, whatever transformers writes."""
    return _TEXT_MODEL + module if module.startswith(_BARE_TEXT) else module


def home_prefix(component: str) -> str:
    """What names of a component begin with in a pipeline of diffusers."""
    return str(load_data("diffusion")["components"].get(component, ("",))[0])
