"""What a configuration says of weights by group of modules (compressed-tensors)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loratool.quant.recognize import settings


def groups(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """How the weights of each group are coded; empty where nothing is said."""
    said = settings(config).get("config_groups")
    found = said.values() if isinstance(said, Mapping) else ()
    weights = [one.get("weights") for one in found if isinstance(one, Mapping)]
    return [one for one in weights if isinstance(one, Mapping)]


def group_size(config: Mapping[str, Any]) -> int:
    """Columns that have one factor, where a group says so; else 0."""
    sizes = [one.get("group_size") for one in groups(config)]
    return next((n for n in sizes if type(n) is int and n > 0), 0)


def block_size(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """(rows, columns) that have one factor, None where nothing is said."""
    sizes = [settings(config).get("weight_block_size")]
    for size in (*sizes, *(one.get("block_structure") for one in groups(config))):
        if (
            isinstance(size, list) and len(size) == 2
            and all(type(n) is int and n > 0 for n in size)
        ):  # fmt: skip
            return size[0], size[1]
    return None
