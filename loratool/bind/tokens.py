"""Rows for new tokens: which table of the base they go into, and how far it grows."""

from __future__ import annotations

from loratool.archs.ties import is_head, word_tables
from loratool.bind.items import BoundReplacement, Found, Item, Misfit
from loratool.bind.place import Context, Placement, misfit, unmergeable
from loratool.dialects.stated import ADDED
from loratool.frozen import replace

_MOST_ROWS = 1 << 24  # tokens of any vocabulary


def place_new_tokens(item: Item, ctx: Context) -> Placement:
    """Put rows after those of the base, or over those that their tokens have already.

    Where no list gives their numbers, vLLM's rule holds: the first is the base's next one.
    """
    new = item.replacement
    assert new is not None
    target, alias = _table(item, ctx)
    if not target:
        return Misfit(item, "LT-425", "a table over the vocabulary", "none in the base")
    problem = unmergeable(item, target, ctx)
    if problem is not None:
        return problem
    shape = ctx.shape(target)
    height, width = ctx.heights.setdefault(target, shape[0]), [*shape[1:]]
    rows = new.rows or tuple(range(height, height + new.source.shape[0]))
    if [*new.source.shape[1:]] != width:
        return misfit(item, "LT-444", f"rows of {width}", f"{list(new.source.shape)}", target)
    follows = rows[0] == height or (new.origin == ADDED and 0 <= rows[0] < height)
    if not follows or rows[-1] >= _MOST_ROWS:
        wanted = f"rows from {height} on"
        return misfit(item, "LT-444", wanted, f"tokens {rows[0]} to {rows[-1]}", target)
    ctx.resized[target] = (max(shape[0], rows[-1] + 1), *width)
    bound = replace(new, rows=rows)
    return Found(item, replacement=BoundReplacement(bound, target), alias=alias)


def _table(item: Item, ctx: Context) -> tuple[str, str]:
    """(stored tensor, name of the tied one that is not stored and is meant)."""
    embedding, head = word_tables(ctx.checkpoint)
    if item.name == "input_embeddings":
        return embedding, ""
    if head:
        return head, ""
    missing = [n for t in ctx.ties if embedding in t.stored for n in t.missing]
    alias = next((n for n in missing if is_head(n) and n.endswith(".weight")), "")
    return (embedding, alias) if alias else ("", "")
