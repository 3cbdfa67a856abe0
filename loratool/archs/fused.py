"""Fused projections: which leaf holds which parts, and which of its rows are whose."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from loratool.archs.base import load_data
from loratool.archs.layers import Heads, attention_sizes, model_types, sub_config
from loratool.frozen import Frozen
from loratool.plan import Span


class FusedLeaf(Frozen):
    """A leaf module that holds several projections.

    Attributes:
        leaf: its name, such as ``qkv_proj``.
        parts: the parts in order, keys of ``parts`` in ``fused.json``.
        layout: how its output rows are shared out: ``qkv`` and ``halves`` (blocks), ``heads``
            (per head q, k, v), ``groups`` (per key-value group), ``falcon``, ``bigcode``.
        only: model types that it holds for; () = every one.
        excluded: model types that it does not hold for.
        joined: the parameter is ``<leaf>_weight`` instead of ``<leaf>.weight`` (torch
            MultiheadAttention).
    """

    leaf: str
    parts: tuple[str, ...]
    layout: str
    only: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()
    joined: bool = False

    def parameter(self, parent: str, kind: str) -> str:
        """Full name of its ``weight`` or ``bias`` below ``parent``."""
        name = f"{self.leaf}{'_' if self.joined else '.'}{kind}"
        return f"{parent}.{name}" if parent else name

    def holds_for(self, types: tuple[str, ...]) -> bool:
        """True if the row applies to a model of these types (any, when none is known)."""
        if any(t in self.excluded for t in types):
            return False
        return not self.only or any(t in self.only for t in types)


@cache
def fused_leaves() -> tuple[FusedLeaf, ...]:
    """Every row of ``fused.json``."""
    return tuple(
        FusedLeaf(
            row["leaf"],
            tuple(row["parts"]),
            row["layout"],
            tuple(row.get("only", ())),
            tuple(row.get("except", ())),
            bool(row.get("joined", False)),
        )
        for row in load_data("fused")["fused"]
    )


@cache
def part_leaves(part: str) -> tuple[str, ...]:
    """Leaf names that a part has where it stands alone, commonest first."""
    return tuple(load_data("fused")["parts"][part])


def part_of(leaf: str) -> str | None:
    """The part that a separate leaf is: ``q_proj`` → ``q``; None if it is no such leaf."""
    for part, leaves in load_data("fused")["parts"].items():
        if leaf in leaves:
            return str(part)
    return None


def leaves_holding(part: str, config: Mapping[str, Any]) -> tuple[FusedLeaf, ...]:
    """Fused leaves that hold a part in a model of this configuration."""
    types = model_types(config)
    return tuple(f for f in fused_leaves() if part in f.parts and f.holds_for(types))


def part_spans(
    fused: FusedLeaf, module: str, config: Mapping[str, Any], total: int, sizes: Mapping[str, int]
) -> dict[str, tuple[Span, ...]] | None:
    """Which rows of the fused tensor belong to which part.

    Args:
        fused: the row of the table.
        module: path of the module, to choose the sub-configuration.
        config: of the base.
        total: output rows of the fused tensor.
        sizes: rows of the parts that are known from shapes; may be incomplete.

    Returns:
        part → ascending spans in the order of the part's own rows; None if the sizes contradict
        each other or the configuration lacks what the layout needs.
    """
    heads = attention_sizes(config, module)
    layout = _resolve_layout(fused.layout, sub_config(config, module))
    if layout in ("qkv", "halves"):
        spans = _blocks(fused.parts, total, sizes, heads if layout == "qkv" else Heads(0, 0, 0))
    elif layout == "heads":
        spans = _grouped(heads.heads, 1, total)
    else:
        share = heads.heads // heads.kv_heads if heads.kv_heads else 0
        spans = _grouped(heads.kv_heads, share, total)
    if spans is None:
        return None
    rows = {part: sum(len(s) for s in pieces) for part, pieces in spans.items()}
    return spans if all(rows[part] == size for part, size in sizes.items()) else None


def _resolve_layout(layout: str, config: Mapping[str, Any]) -> str:
    if layout == "falcon":
        if config.get("new_decoder_architecture"):
            return "groups"
        return "qkv" if config.get("multi_query", True) else "heads"
    if layout == "bigcode":
        return "qkv" if config.get("multi_query", True) else "heads"
    return layout


def _blocks(
    parts: tuple[str, ...], total: int, sizes: Mapping[str, int], heads: Heads
) -> dict[str, tuple[Span, ...]] | None:
    """Parts one after another; sizes follow from the configuration or from one known part."""
    if len(parts) == 2:
        rows = [total // 2, total // 2] if total % 2 == 0 else []
    else:
        rows = _qkv_rows(total, sizes, heads)
    if not rows or sum(rows) != total:
        return None
    starts = [sum(rows[:i]) for i in range(len(rows))]
    return {
        part: (Span(start, start + size),)
        for part, start, size in zip(parts, starts, rows, strict=True)
    }


def _qkv_rows(total: int, sizes: Mapping[str, int], heads: Heads) -> list[int]:
    query, key = heads.heads * heads.head_dim, heads.kv_heads * heads.head_dim
    if query and query + 2 * key == total:
        return [query, key, key]
    if "q" in sizes:
        query = sizes["q"]
        key = (total - query) // 2
    elif "k" in sizes or "v" in sizes:
        key = sizes.get("k", sizes.get("v", 0))
        query = total - 2 * key
    else:
        return []
    # Grouped-query attention repeats each key head a whole number of times.
    return [query, key, key] if key > 0 and query >= key and query % key == 0 else []


def _grouped(groups: int, share: int, total: int) -> dict[str, tuple[Span, ...]] | None:
    """Per group: ``share`` query heads, one key head, one value head."""
    if groups < 1 or share < 1 or total % (groups * (share + 2)):
        return None
    dim = total // (groups * (share + 2))
    width = (share + 2) * dim
    starts = [g * width for g in range(groups)]
    return {
        "q": tuple(Span(s, s + share * dim) for s in starts),
        "k": tuple(Span(s + share * dim, s + (share + 1) * dim) for s in starts),
        "v": tuple(Span(s + (share + 1) * dim, s + width) for s in starts),
    }
