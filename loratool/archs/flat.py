"""Which tensor of a base does a flat name mean?  By look-up alone: a name is never un-flattened.

kohya and its kin write ``down_blocks_0_attentions_0_proj_in`` for ``down_blocks.0.attentions.0.
proj_in``; what was a dot and what an underscore cannot be told from the name.  So the names of the
base are flattened, in every spelling that its modules have anywhere (`diffusion.json`), and the
adapter's are looked up among them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache

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


@dataclass
class FlatNames:
    """The names of a base as flat dialects spell them.

    Attributes:
        own: (prefix of a component, flat module, parameter) -> what it means.
        other: the same for spellings that the base does not use itself.
    """

    own: dict[_Key, list[Meaning]] = field(default_factory=dict)
    other: dict[_Key, list[Meaning]] = field(default_factory=dict)

    def look_up(self, component: str, flat: str, parameter: str) -> list[Meaning]:
        """Everything that a name may mean: none, one, or several; the base's own names first."""
        prefixes = (*load_data("diffusion")["components"].get(component, ()), "")
        for spelled in dict.fromkeys((flat, flat.strip("_"))):  # some trainers add one too many
            for index in (self.own, self.other):
                found = [m for p in prefixes for m in index.get((p, spelled, parameter), ())]
                if found:
                    return list(dict.fromkeys(found))
        return []

    def add(self, prefix: str, names: Iterable[str]) -> None:
        """Take in the tensors of a component, by their names behind its prefix."""
        spellings = cache(_spellings)
        for name in (part for one in names for part in (one, *_parts_of(one))):
            module, _, parameter = name.rpartition(".")
            meaning = Meaning((prefix + name,))
            _put(self.own, (prefix, module, parameter), meaning)
            for spelled in spellings(module):
                _put(self.other, (prefix, spelled, parameter), meaning)

    def add_fused(self, prefix: str, names: Collection[str]) -> None:
        """Modules that the original code has as one, and this base as several."""
        for row in load_data("diffusion")["fused"]:
            rules = [Rule(f"^{part}", f"^{row['one']}") for part in row["parts"]]
            for name in names:
                module, _, parameter = name.rpartition(".")
                one = rules[0].to_memory(module)
                parts = [f"{rule.to_disk(one)}.{parameter}" for rule in rules]
                if one != module and all(part in names for part in parts):
                    whole = Meaning(tuple(prefix + p for p in parts), row.get("swapped", False))
                    _put(self.other, (prefix, one, parameter), whole)


def flat_names(names: Iterable[str]) -> FlatNames:
    """Index the tensors of a base.

    Args:
        names: of all tensors; those of a pipeline begin with its components.

    Example:
        >>> flat_names(["unet.conv_in.weight"]).look_up("unet", "conv_in", "weight")[0].names
        ('unet.conv_in.weight',)
    """
    names, index = list(names), FlatNames()
    for prefix in ("", *_prefixes()):
        inside = dict.fromkeys(n[len(prefix) :] for n in names if n.startswith(prefix))
        index.add(prefix, inside)
        index.add_fused(prefix, inside)
    return index


@cache
def known_names() -> FlatNames:
    """The modules of Stable Diffusion 1 and 2, SDXL, FLUX.1 and their text encoders."""
    index = FlatNames()
    for template in load_data("diffusion")["modules"]:
        index.add("", [f"{n}.{leaf}" for n in expand(template) for leaf in ("weight", "bias")])
    return index


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
    for table in _tables():
        found |= {table.to_memory(module), table.to_disk(module)}
    for one in list(found):
        if one.startswith(_TEXT_MODEL):
            found.add(one.removeprefix(_TEXT_MODEL))
        elif one.startswith(_BARE_TEXT):  # transformers 5 left it out
            found.add(_TEXT_MODEL + one)
    return tuple(sorted(found - {module}))


def _parts_of(name: str) -> Iterator[str]:
    """OpenCLIP has one tensor for q, k and v; binding cuts it."""
    if joined := _JOINED.fullmatch(name):
        parts = ("q_proj", "k_proj", "v_proj")
        yield from (f"{joined['parent']}.{part}.{joined['kind']}" for part in parts)


def home_prefix(component: str) -> str:
    """What names of a component begin with in a pipeline of diffusers."""
    prefixes = load_data("diffusion")["components"].get(component, ("",))
    return str(prefixes[0])
