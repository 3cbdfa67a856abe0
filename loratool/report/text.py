"""Words and numbers for people, at a terminal or on a page: foreign text made safe, units, counts.

Whatever comes from a file (names, metadata, configuration) passes `safe` before it is shown:
a file must not be able to move the cursor, hide text or speak in our name.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence

from loratool.errors import redact

FIELD_CAP = 200
"""Longest piece of foreign text shown, in characters."""

_HIDDEN_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})
_FILLERS = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0")
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


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
    """A fraction as per cent; never rounds up to 100 % or down to 0 %: ``> 99.9999 %``.

    Args:
        share: 0 to 1.
        aligned: keep a zero after the point, for columns.
    """
    percent = 100 * share
    if 0 < percent < 0.1:
        return f"{percent:.1g} %"
    if 99.9 < percent < 100:
        digits = next((d for d in range(2, 5) if round(percent, d) < 100), None)
        return "> 99.9999 %" if digits is None else f"{percent:.{digits}f} %"
    text = f"{percent:.1f}"
    return (text if aligned else text.removesuffix(".0")) + " %"


def format_lost(share: float) -> str:
    """A relative error: ``nothing``, ``2e-07`` or ``4.9 %``."""
    if share < 1e-12:
        return "nothing"
    return f"{share:.1g}" if share < 1e-3 else format_share(share)


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


def some(names: Sequence[str], limit: int = 4) -> str:
    """The first names, safe, and how many more there are."""
    shown = ", ".join(safe(name) for name in names[:limit])
    rest = len(names) - limit
    return shown if rest <= 0 else f"{shown} and {rest:,} more"
