"""Text for terminals: lines, tables and JSON; words and numbers are those of `report.text`."""

from __future__ import annotations

import json
import sys
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import click

from loratool.errors import LOGIN, TOKEN, own_secrets, redact
from loratool.lazy import regex
from loratool.report.text import (
    FIELD_CAP,
    format_bytes,
    format_count,
    format_lost,
    format_number,
    format_seconds,
    format_shape,
    format_share,
    plural,
    safe,
    some,
    three_digits,
)

__all__ = [
    "FIELD_CAP",
    "advice",
    "cell_width",
    "dump_json",
    "format_bytes",
    "format_count",
    "format_lost",
    "format_number",
    "format_seconds",
    "format_shape",
    "format_share",
    "is_terminal",
    "line",
    "plural",
    "safe",
    "short",
    "some",
    "table",
    "terminal_width",
    "three_digits",
    "wrapped",
]

_LABEL_WIDTH = 10
_LEAST_CELL = 12


# ------------------------------------------------------------------------- lines and tables


def line(label: str, *facts: str, tone: str | None = None) -> str:
    """``label    fact · fact``, the label in bold (or in ``tone``: ``warn``, ``bad``, ``good``).

    On a terminal it goes on below the first fact where it is too long.

    Args:
        label: first word of the line; safe.
        facts: safe; empty ones are left out.
        tone: colour of the label.
    """
    head = label.ljust(len(label) + max(_LABEL_WIDTH - cell_width(label), 2 if label else 0))
    text = head + " · ".join(f for f in facts if f)
    if is_terminal():
        text = wrapped(text, terminal_width(), len(head))
    return click.style(label, **_TONES[tone]) + text[len(label) :]


def wrapped(text: str, columns: int, start: int = 0) -> str:
    """A line cut at its facts, else between words, and indented; a command to type stays whole.

    Args:
        text: safe, without styles.
        columns: of the terminal.
        start: how much of it is the label.
    """
    if cell_width(text) <= columns:
        return text
    lines, indent, between = [text[:start]], " " * _LABEL_WIDTH, ""
    for fact in text[start:].split(" · "):
        words = [fact] if cell_width(indent + fact) <= columns else _WORDS.findall(fact)
        for word in words:
            if between and cell_width(lines[-1] + between + word) > columns:
                lines.append(indent)
                between = ""
            lines[-1] += between + word
            between = " "
        between = " · "
    return "\n".join(lines)


_WORDS = regex(r"(?:loratool|pip) [a-z]+ .*|\S+")


_TONES: dict[str | None, dict[str, Any]] = {
    None: {"bold": True},
    "dim": {"dim": True},
    "warn": {"fg": "yellow", "bold": True},
    "bad": {"fg": "red", "bold": True},
    "good": {"fg": "green", "bold": True},
}


def advice(label: str, command: str, output: str) -> Iterator[str]:
    """The line with the command to type next; none where no command reads the output.

    Args:
        label: first word of the line.
        command: "" if there is none.
        output: what it is about; an address is for writing alone.
    """
    if command and "://" not in output:
        yield line(label, safe(command, cap=2000), tone="dim")


def table(
    rows: Sequence[Sequence[str]],
    head: Sequence[str],
    *,
    right: Iterable[int] = (),
    fold: bool = False,
) -> list[str]:
    """Columns padded to their widest cell, two spaces apart (one to fit), the head in bold.

    On a terminal the widest texts are shortened until all fits, the first column at its start;
    where numbers alone are too wide it is folded.

    Args:
        rows: safe cells.
        head: column names.
        right: indices of columns aligned to the right.
        fold: on a terminal, columns beyond its edge go below, beside the first one once more.
    """
    cells = [list(head), *(list(row) for row in rows)]
    widths = [max(cell_width(row[i]) for row in cells) for i in range(len(head))]
    to_right, gap = set(right), "  "
    if not fold and is_terminal():
        widths = _fitting(widths, to_right, terminal_width())
        over = sum(widths) + 2 * len(widths) - 2 - terminal_width()
        if over >= len(widths):
            return table(rows, head, right=to_right, fold=True)
        gap = " " if over > 0 else gap
        cells = [[short(cell, width, at_start=not i)
                  for i, (cell, width) in enumerate(zip(row, widths, strict=True))]
                 for row in cells]  # fmt: skip
    ends = accumulate(width + 2 for width in widths)
    fit = max(2, sum(end - 2 <= terminal_width() for end in ends)) if fold else len(head)
    if fit < len(head) and is_terminal():
        below = [i - fit + 1 for i in to_right if i >= fit]
        return [
            *table([row[:fit] for row in rows], head[:fit], right=to_right & set(range(fit))), "",
            *table([(row[0], *row[fit:]) for row in rows], (head[0], *head[fit:]), right=below,
                   fold=True),
        ]  # fmt: skip
    lines = []
    for row in cells:
        padded = [
            " " * (width - cell_width(cell)) + cell if i in to_right
            else cell + " " * (width - cell_width(cell))
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]  # fmt: skip
        lines.append(gap.join(padded).rstrip())
    return [click.style(lines[0], bold=True), *lines[1:]]


def _fitting(widths: Sequence[int], fixed: Collection[int], columns: int) -> list[int]:
    """Widths of which the largest are reduced until they fit; numbers keep theirs."""
    found = list(widths)
    free = [i for i in range(len(found)) if i not in fixed]
    over = sum(found) + 2 * (len(found) - 1) - columns
    while over > 0 and free and max(found[i] for i in free) > _LEAST_CELL:
        found[max(free, key=found.__getitem__)] -= 1
        over -= 1
    return found


def short(text: str, columns: int, *, at_start: bool = False) -> str:
    """A text cut to that many columns, the cut marked.

    Args:
        text: safe.
        columns: at most.
        at_start: the end is kept: of a tensor's name that tells more.
    """
    if cell_width(text) <= columns:
        return text
    while cell_width(text) >= columns:
        text = text[1:] if at_start else text[:-1]
    return "…" + text if at_start else text + "…"


def cell_width(text: str) -> int:
    """Terminal columns: East Asian wide characters take two, combining marks none."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


# ------------------------------------------------------------------------------------ JSON


def dump_json(value: Mapping[str, Any], *, indent: bool = False) -> str:
    """One JSON object in printable ASCII, tokens blanked."""
    text = json.dumps(value, ensure_ascii=True, indent=2 if indent else None)
    if _may_hold_secrets(text):
        text = json.dumps(_redacted(value), ensure_ascii=True, indent=2 if indent else None)
    return text.replace("\x7f", "\\u007f")


def _may_hold_secrets(text: str) -> bool:
    """False if no string of a JSON text would change: one look instead of one for each."""
    own = any(s in text or json.dumps(s)[1:-1] in text for s in own_secrets())
    return own or bool(TOKEN.search(text) or LOGIN.search(text))


def _redacted(value: Any) -> Any:
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {redact(k): _redacted(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_redacted(v) for v in value]
    return value


def terminal_width() -> int:
    """Columns of the terminal."""
    from shutil import get_terminal_size  # and every compression that Python knows

    return get_terminal_size().columns


def is_terminal(stream: Any = None) -> bool:
    """True if the stream (default stdout) is a terminal."""
    target = sys.stdout if stream is None else stream
    return bool(getattr(target, "isatty", lambda: False)())
