"""Names of mixture-of-experts weights: one tensor per expert, or all experts in one."""

from __future__ import annotations

import re
from functools import cache

from loratool.archs.base import load_data
from loratool.frozen import Frozen


class ExpertName(Frozen):
    """What the name of an expert weight says.

    Attributes:
        container: path of the experts, such as ``model.layers.0.mlp.experts``.
        expert: index; None for a tensor that holds every expert.
        parts: ``gate``, ``up``, ``down`` in the order in which the tensor holds them.
    """

    container: str
    expert: int | None
    parts: tuple[str, ...]


def parse_expert(name: str) -> ExpertName | None:
    """Read ``<container>.<e>.<leaf>.weight`` or ``<container>.<fused>[.weight]``.

    Example:
        >>> parse_expert("mlp.experts.3.w1.weight").parts
        ('gate',)
    """
    match = _pattern().fullmatch(name) if any(map(name.__contains__, _containers())) else None
    if match is None:
        return None
    container, index, leaf, suffix = match.groups()
    fused = tuple(load_data("experts")["fused"].get(leaf, ()))
    if index is None:
        return ExpertName(container, None, fused) if fused else None
    part = _part_of_leaf().get(leaf)
    parts = (part,) if part else fused
    return ExpertName(container, int(index), parts) if parts and suffix else None


def expert_names(container: str, expert: int, part: str) -> tuple[str, ...]:
    """Names that one part of one expert may have where each expert has its own tensors."""
    leaves = load_data("experts")["leaves"][part]
    return tuple(f"{container}.{expert}.{leaf}.weight" for leaf in leaves)


def fused_names(container: str, part: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """(name, parts in it) of the tensors of all experts that may hold a part."""
    fused = load_data("experts")["fused"]
    return tuple(
        (f"{container}.{leaf}{suffix}", tuple(parts))
        for leaf, parts in fused.items()
        if part in parts
        for suffix in ("", ".weight")
    )


@cache
def _part_of_leaf() -> dict[str, str]:
    leaves = load_data("experts")["leaves"]
    return {leaf: part for part, names in leaves.items() for leaf in names}


@cache
def _containers() -> tuple[str, ...]:
    return tuple(load_data("experts")["containers"])


@cache
def _pattern() -> re.Pattern[str]:
    return re.compile(rf"((?:.*\.)?(?:{'|'.join(_containers())}))\.(?:(\d+)\.)?(\w+?)(\.weight)?")
