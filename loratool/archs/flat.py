"""Which tensor of a base does a flat name mean?  By look-up alone: a name is never un-flattened.

kohya and its kin write ``down_blocks_0_attentions_0_proj_in`` for ``down_blocks.0.attentions.0.
proj_in``; what was a dot and what an underscore cannot be told from the name.  So the names of the
base are flattened, in every spelling that its modules have anywhere (`diffusion.json`), and the
adapter's are looked up among them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property

from loratool.archs.base import Rule, Table, load_data, read_rules

_TEXT_MODEL = "text_model."
_BARE_TEXT = ("encoder.layers.", "embeddings.", "final_layer_norm")
_CHOICE = re.compile(r"\{([^{}]*)\}")
_JOINED = re.compile(r"(?P<parent>.+\.attn)\.in_proj_(?P<kind>weight|bias)")


_Key = tuple[str, str, str]


@dataclass(frozen=True)
class Meaning:
    """What a flat name stands for in a base.

    Attributes:
        names: the tensor; of a fused module on separate ones all of them, in the order of rows.
        is_swapped: the halves of the rows have changed places (FLUX' last modulation).
    """

    names: tuple[str, ...]
    is_swapped: bool = False


class FlatNames:
    """The names of a base as flat dialects spell them.

    Args:
        parts: prefix of a component -> the names of its tensors behind it; "" -> all of them.
    """

    def __init__(self, parts: Mapping[str, Collection[str]]) -> None:
        self._parts = parts

    def look_up(self, component: str, flat: str, parameter: str) -> list[Meaning]:
        """Everything that a name may mean: none, one, or several; the base's own names first.

        Args:
            component: that it is of, a key of `diffusion.json`; "" = any.
            flat: the module.
            parameter: of it.
        """
        known = load_data("diffusion")["components"]
        prefixes = (*known.get(component, () if component else _prefixes()), "")
        spellings = dict.fromkeys((flat, flat.strip("_")))  # some trainers add one too many
        for own in (True, False):
            index = self.own if own else self.other
            for spelled in spellings:
                found = [m for p in prefixes for m in index.get((p, spelled, parameter), ())]
                if found:
                    return list(dict.fromkeys(found))
        return []

    @cached_property
    def own(self) -> dict[_Key, list[Meaning]]:
        """(prefix, flat module, parameter) -> what it means, by the base's own names."""
        index: dict[_Key, list[Meaning]] = {}
        for prefix, name in self._names():
            module, _, parameter = name.rpartition(".")
            _put(index, (prefix, module, parameter), Meaning((prefix + name,)))
        return index

    @cached_property
    def other(self) -> dict[_Key, list[Meaning]]:
        """The same by the names that other programs have for these modules."""
        index: dict[_Key, list[Meaning]] = {}
        spellings = cache(_spellings)
        for prefix, name in self._names():
            module, _, parameter = name.rpartition(".")
            for spelled in spellings(module):
                _put(index, (prefix, spelled, parameter), Meaning((prefix + name,)))
        for prefix, names in self._parts.items():
            for one, parameter, parts, is_swapped in _fused(names):
                whole = Meaning(tuple(prefix + part for part in parts), is_swapped)
                _put(index, (prefix, one, parameter), whole)
        return index

    def _names(self) -> Iterator[tuple[str, str]]:
        for prefix, names in self._parts.items():
            yield from ((prefix, part) for one in names for part in (one, *_parts_of(one)))


def flat_names(names: Iterable[str]) -> FlatNames:
    """Index the tensors of a base.

    Args:
        names: of all tensors; those of a pipeline begin with its components.

    Example:
        >>> flat_names(["unet.conv_in.weight"]).look_up("unet", "conv_in", "weight")[0].names
        ('unet.conv_in.weight',)
    """
    names = list(names)
    return FlatNames({
        prefix: dict.fromkeys(n[len(prefix) :] for n in names if n.startswith(prefix)).keys()
        for prefix in ("", *_prefixes())
    })  # fmt: skip


@cache
def known_names() -> FlatNames:
    """The modules of Stable Diffusion 1 and 2, SDXL, FLUX.1 and their text encoders."""
    modules = (n for template in load_data("diffusion")["modules"] for n in expand(template))
    return FlatNames({"": [f"{n}.{leaf}" for n in modules for leaf in ("weight", "bias")]})


def expand(template: str) -> Iterator[str]:
    """All names of a template: ``{0-3}`` stands for numbers, ``{q|k}`` for either word.

    Example:
        >>> list(expand("b.{0-1}.{q|k}"))
        ['b.0.q', 'b.0.k', 'b.1.q', 'b.1.k']
    """
    match = _CHOICE.search(template)
    if match is None:
        yield template
        return
    first, dash, last = match[1].partition("-")
    words = map(str, range(int(first), int(last) + 1)) if dash else match[1].split("|")
    for word in words:
        yield from expand(template[: match.start()] + word + template[match.end() :])


def components_of(name: str) -> Iterator[tuple[str, str]]:
    """(component, prefix) of every component that a dotted name of a pipeline may belong to."""
    for component, prefixes in load_data("diffusion")["components"].items():
        yield from ((component, p) for p in prefixes if name.startswith(p))


@cache
def _prefixes() -> tuple[str, ...]:
    parts = load_data("diffusion")["components"].values()
    return tuple(dict.fromkeys(p for prefixes in parts for p in prefixes))


def _put(index: dict[_Key, list[Meaning]], key: _Key, meaning: Meaning) -> None:
    prefix, module, parameter = key
    meanings = index.setdefault((prefix, module.replace(".", "_"), parameter), [])
    if meaning not in meanings:
        meanings.append(meaning)


@cache
def _tables() -> tuple[Table, ...]:
    spellings = load_data("diffusion")["spellings"]
    return tuple(Table(name, read_rules(pairs)) for name, pairs in spellings.items())


def _spellings(module: str) -> tuple[str, ...]:
    """How a module is called anywhere else."""
    found = {module}
    for table in (t for t in _tables() if t.touches(module)):
        found |= {table.to_memory(module), table.to_disk(module)}
    for one in list(found):
        if one.startswith(_TEXT_MODEL):
            found.add(one.removeprefix(_TEXT_MODEL))
        else:  # transformers 5 left it out
            found.add(with_text_model(one))
    return tuple(sorted(found - {module}))


def _parts_of(name: str) -> Iterator[str]:
    """OpenCLIP has one tensor for q, k and v; binding cuts it."""
    if joined := _JOINED.fullmatch(name):
        parts = ("q_proj", "k_proj", "v_proj")
        yield from (f"{joined['parent']}.{part}.{joined['kind']}" for part in parts)


def with_text_model(module: str) -> str:
    """A text encoder's module as programs of images look it up, whatever transformers writes."""
    return _TEXT_MODEL + module if module.startswith(_BARE_TEXT) else module


def home_prefix(component: str) -> str:
    """What names of a component begin with in a pipeline of diffusers."""
    prefixes = load_data("diffusion")["components"].get(component, ("",))
    return str(prefixes[0])


def _fused(names: Collection[str]) -> Iterator[tuple[str, str, list[str], bool]]:
    """(module, parameter, tensors, is swapped): what the original code has as one module."""
    for row in load_data("diffusion")["fused"]:
        rules = [Rule(f"^{part}", f"^{row['one']}") for part in row["parts"]]
        for name in names:
            module, _, parameter = name.rpartition(".")
            one = rules[0].to_memory(module)
            if one == module:
                continue
            parts = [f"{rule.to_disk(one)}.{parameter}" for rule in rules]
            if all(part in names for part in parts):
                yield one, parameter, parts, row.get("swapped", False)
