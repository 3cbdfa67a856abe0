"""In-memory names (transformers 5) and on-disk names of one base, both ways.

Adapters use the names of the running model; weight files keep the names of the version that
wrote them, and transformers converts between the two when it loads and saves.
"""

from __future__ import annotations

from functools import cache

from loratool.archs.base import Table, load_data, read_rules
from loratool.archs.experts import parse_expert


@cache
def tables_for(model_type: str) -> tuple[Table, ...]:
    """The in-memory namings that a ``model_type`` has had, newest last; () = same as on disk."""
    chains = load_data("renames")["model_types"].get(model_type, ())
    return tuple(_chain(tuple(chain)) for chain in chains)


@cache
def all_tables() -> tuple[Table, ...]:
    """Every distinct naming, for a base whose ``model_type`` is not known."""
    found = {
        tuple(chain): _chain(tuple(chain))
        for chains in load_data("renames")["model_types"].values()
        for chain in chains
    }
    return tuple(found[key] for key in sorted(found))


@cache
def known_model_types() -> tuple[str, ...]:
    """Every ``model_type`` whose on-disk and in-memory names differ, sorted."""
    return tuple(sorted(load_data("renames")["model_types"]))


def to_memory(model_type: str, disk_name: str, version: str = "v5") -> str:
    """The in-memory name of an on-disk tensor or module.

    The tensor of a single expert keeps its on-disk name: many such tensors are one parameter in
    memory, and PEFT reads the on-disk spelling under transformers 4 and 5.

    Args:
        model_type: of the base's configuration; unknown types keep their names.
        disk_name: name in the weight files.
        version: ``v5`` = transformers 5; ``v4`` = the on-disk name (transformers 4).

    Example:
        >>> to_memory("gpt_neox", "embed_out.weight")
        'lm_head.weight'
    """
    tables = tables_for(model_type)
    expert = parse_expert(disk_name) or parse_expert(f"{disk_name}.weight")
    is_single_expert = expert is not None and expert.expert is not None
    if version == "v4" or not tables or is_single_expert:
        return disk_name
    return tables[-1].to_memory(disk_name)


def to_disk(model_type: str, name: str) -> tuple[str, ...]:
    """On-disk names that an in-memory name may have, likeliest first, never empty.

    Example:
        >>> to_disk("gpt_neox", "lm_head.weight")
        ('embed_out.weight', 'lm_head.weight')
    """
    found = [table.to_disk(name) for table in reversed(tables_for(model_type))]
    return tuple(dict.fromkeys([*found, name]))


@cache
def _chain(names: tuple[str, ...]) -> Table:
    tables = load_data("renames")["tables"]
    rules = tuple(rule for n in names for rule in read_rules(tables[n]["rules"]))
    return Table("+".join(names), rules)
