"""Fused attention whose rows lie head by head: q k v of the first head, of the second, ….

MiniMax-H3 in its makers' own shards.  Their code puts the rows in order when it loads them
(`reorder_interleaved_qkv` of diffusers' ``scripts/convert_minimax_h3_to_diffusers.py``), as do
ComfyUI's files of it, and adapters have them in that order; names and shapes are the same.  What
tells the shards is their configuration, which has the makers' words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from loratool.lazy import regex

_FUSED = regex(r"(^|\.)blocks\.\d+\.attn\.qkv_proj\.(weight|bias)$")
_KEY = "token_refiner_num_layers"
_HEAD = 128  # rows, in every released size
Rows = tuple[int, int]
"""(first, stop)."""


def head_rows(config: Mapping[str, Any], tensor: str) -> int:
    """Rows of a head, where a tensor of a base lies head by head; else 0.

    Example:
        >>> head_rows({"token_refiner_num_layers": 2}, "blocks.0.attn.qkv_proj.weight")
        128
    """
    parts = (config, *(part for part in config.values() if isinstance(part, Mapping)))
    return _HEAD if _FUSED.search(tensor) and any(_KEY in part for part in parts) else 0


def is_order_untold(config: Mapping[str, Any], tensor: str) -> bool:
    """True for such a tensor of a base that has no configuration."""
    return not config and _FUSED.search(tensor) is not None


def cut_at(spans: Sequence[Rows], height: int) -> Iterator[Rows]:
    """Spans, cut at the multiples of a height."""
    for start, stop in spans:
        while start < stop:
            edge = min(stop, start - start % height + height)
            yield start, edge
            start = edge


def by_heads(start: int, stop: int, rows: int, head: int) -> Iterator[Rows]:
    """Where rows of q, of k or of v lie in a tensor that has them head by head; ascending.

    Args:
        start: the first of them in the order q, k, v, and
        stop: the one behind the last.
        rows: of the tensor.
        head: rows of a head.

    Example:
        >>> list(by_heads(0, 4, 12, 2))  # all of q
        [(0, 2), (6, 8)]
    """
    for first, last in cut_at([(start, stop)], head):
        kind, rest = divmod(first, rows // 3)
        at = rest // head * 3 * head + kind * head + rest % head
        yield at, at + last - first
