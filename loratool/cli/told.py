"""What a file says of itself: trainer, work, trigger words.  All of it is foreign text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from loratool.cli.render import line, safe

if TYPE_CHECKING:
    from loratool.report.inspect import AdapterSummary

_SHOWN_TAGS = 5
_ENTRY = 40  # characters of an entry's name


def told_lines(one: AdapterSummary) -> Iterator[str]:
    """Who made it and of what, how it is called up, and the trainer's note."""
    told = one.told
    work = " ".join(filter(None, (
        f"“{safe(told.title, cap=60)}”" if told.title else "",
        f"by {safe(told.author, cap=40)}" if told.author else "",
    )))  # fmt: skip
    about = [f for f in (work, safe(told.tags, cap=80)) if f]
    if about:
        yield line("about", *about, "has a thumbnail" if told.has_thumbnail else "")
    if told.description:
        yield line("", safe(told.description))
    if one.trainer or told.training:
        yield line("trained", *filter(None, (safe(one.trainer, cap=60), *map(safe, told.training))))
    words = [f"{safe(text)} ({safe(where, cap=_ENTRY)})" for text, where in told.triggers]
    tags = ", ".join(f"{safe(tag, cap=40)} {n:,}" for tag, n in told.frequent[:_SHOWN_TAGS])
    if words or tags:
        yield line("trigger", *words, f"tags {tags}" if tags else "")
    if told.comment:
        yield line("comment", safe(told.comment))
