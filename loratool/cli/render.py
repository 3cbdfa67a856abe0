"""Text for people: escaping, numbers, lines and tables.

Whatever comes from a file (names, metadata, configuration) passes `safe` before it is printed:
a file must not be able to move the cursor, hide text or speak in our name.
"""

from __future__ import annotations

import json
import shutil
import sys
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import click

from loratool.errors import LOGIN, TOKEN, own_secrets, redact

FIELD_CAP = 200
"""Longest piece of foreign text shown, in characters."""

_HIDDEN_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})
_FILLERS = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0")
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
_LABEL_WIDTH = 10


def safe(text: object, *, cap: int = FIELD_CAP) -> str:
    r"""Make foreign text printable: control, bidi and invisible characters become escapes.

    Tokens and logins in URLs are blanked.  Nothing in the result is terminal markup.

    Args:
        text: anything; its `str` is used.
        cap: longest result, in characters before the cut is marked.

    Example:
        >>> safe("a\x1b[31mb")
        'a\\x1b[31mb'
    """
    found = str(text)
    if len(found) > 4 * cap:
        found = found[: 4 * cap]  # no need to escape a megabyte; room for redaction to shorten it
    found = "".join(_escape(c) if _is_hidden(c) else c for c in redact(found))
    return found if len(found) <= cap else found[: cap - 1] + "…"


def _is_hidden(char: str) -> bool:
    return unicodedata.category(char) in _HIDDEN_CATEGORIES or char in _FILLERS


def _escape(char: str) -> str:
    code = ord(char)
    if char in _SHORT:
        return _SHORT[char]
    return (
        f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"
    )


# --------------------------------------------------------------------------------- numbers


def format_bytes(count: float) -> str:
    """Bytes in decimal units: ``1.33 GB``, ``410 MB``, ``640 B``."""
    return _scaled(count, (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)), " B")


def format_count(count: float) -> str:
    """A number of parameters: ``43.6 M``, ``22.7 M``, ``338 k``, ``512``."""
    return _scaled(count, (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)), "")


def _scaled(count: float, units: Sequence[tuple[str, float]], rest: str) -> str:
    for unit, size in units:
        if count >= size * 0.9995:  # 999.95 k reads better as 1.00 M
            return f"{three_digits(count / size)} {unit}"
    return f"{count:.0f}{rest}"


def three_digits(value: float) -> str:
    """Three significant digits without an exponent: ``1.33``, ``43.6``, ``622``."""
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def format_share(share: float, *, aligned: bool = False) -> str:
    """A fraction as per cent; never rounds up to 100 % or down to 0 %.

    Args:
        share: 0 to 1.
        aligned: keep a zero after the point, for columns.
    """
    percent = 100 * share
    if 0 < percent < 0.1:
        return f"{percent:.1g} %"
    if 99.9 < percent < 100:
        digits = next((d for d in range(2, 12) if round(percent, d) < 100), 12)
        return f"{percent:.{digits}f} %"
    text = f"{percent:.1f}"
    return (text if aligned else text.removesuffix(".0")) + " %"


def format_seconds(seconds: float) -> str:
    """``0.04 s``, ``0.8 s``, ``12 s``, ``3:07``, ``1:02:03``."""
    if seconds < 0.095:
        return f"{seconds:.2f} s"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, secs = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"


def format_number(value: float) -> str:
    """A coefficient or scaling as people write it: ``2``, ``0.7``, ``1.41421``."""
    return f"{value:.6g}"


def plural(count: int, noun: str, many: str = "") -> str:
    """``1 tensor``, ``3 tensors``, ``12,000 matrices``."""
    return f"{count:,} {noun if count == 1 else many or noun + 's'}"


def format_shape(shape: Iterable[int]) -> str:
    """``4096×1024``; a scalar is ``scalar``."""
    return "×".join(map(str, shape)) or "scalar"


# ------------------------------------------------------------------------- lines and tables


def line(label: str, *facts: str, tone: str | None = None) -> str:
    """``label    fact · fact``, the label in bold (or in ``tone``: ``warn``, ``bad``, ``good``).

    Args:
        label: first word of the line; safe.
        facts: safe; empty ones are left out.
        tone: colour of the label.
    """
    padding = " " * (max(_LABEL_WIDTH - cell_width(label), 2) if label else _LABEL_WIDTH)
    return click.style(label, **_TONES[tone]) + padding + " · ".join(f for f in facts if f)


_TONES: dict[str | None, dict[str, Any]] = {
    None: {"bold": True},
    "dim": {"dim": True},
    "warn": {"fg": "yellow", "bold": True},
    "bad": {"fg": "red", "bold": True},
    "good": {"fg": "green", "bold": True},
}


def table(
    rows: Sequence[Sequence[str]],
    head: Sequence[str],
    *,
    right: Iterable[int] = (),
    crop: bool = False,
) -> list[str]:
    """Columns padded to their widest cell, two spaces apart, the head in bold.

    Args:
        rows: safe cells.
        head: column names.
        right: indices of columns aligned to the right.
        crop: on a terminal, cut lines at its edge instead of letting them wrap.
    """
    cells = [list(head), *(list(row) for row in rows)]
    widths = [max(cell_width(row[i]) for row in cells) for i in range(len(head))]
    to_right = set(right)
    lines = []
    for row in cells:
        padded = [
            " " * (width - cell_width(cell)) + cell if i in to_right
            else cell + " " * (width - cell_width(cell))
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]  # fmt: skip
        lines.append("  ".join(padded).rstrip())
    if crop and is_terminal():
        lines = [_crop(text, shutil.get_terminal_size().columns) for text in lines]
    return [click.style(lines[0], bold=True), *lines[1:]]


def _crop(text: str, columns: int) -> str:
    if cell_width(text) <= columns:
        return text
    while cell_width(text) >= columns:
        text = text[:-1]
    return text + "…"


def cell_width(text: str) -> int:
    """Terminal columns: East Asian wide characters take two, combining marks none."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def some(names: Sequence[str], limit: int = 4) -> str:
    """The first names, safe, and how many more there are."""
    shown = ", ".join(safe(name) for name in names[:limit])
    rest = len(names) - limit
    return shown if rest <= 0 else f"{shown} and {rest:,} more"


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


def is_terminal(stream: Any = None) -> bool:
    """True if the stream (default stdout) is a terminal."""
    target = sys.stdout if stream is None else stream
    return bool(getattr(target, "isatty", lambda: False)())
