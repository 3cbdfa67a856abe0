"""Thumbnails of files: shown only if they are what they say, of a small size and few pixels."""

from __future__ import annotations

import base64
import binascii
import re

from loratool.lazy import regex

MOST_BYTES = 256_000
"""Largest picture that is shown, in bytes."""
MOST_PIXELS = 4096
"""Longest side of a picture that is shown."""
_URI = regex(r"data:image/(?:png|jpe?g|webp);base64,", re.IGNORECASE)
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


def checked_picture(text: str) -> tuple[str, str]:
    """A data URI made anew from the bytes, or why there is none.

    Args:
        text: a data URI of PNG, JPEG or WebP, or base64 alone.

    Returns:
        (the URI, "") or ("", the reason in words).
    """
    if len(text) > MOST_BYTES * 4 // 3 + 100:
        return "", "picture too large to show"
    found = _URI.match(text)
    if found is None and text[:5].lower() == "data:":
        return "", "picture is no PNG, JPEG or WebP"
    try:
        data = base64.b64decode(text[found.end() if found else 0 :].strip(), validate=True)
    except (binascii.Error, ValueError):
        return "", "damaged picture"
    kind, sides = _look(data)
    if kind == "":
        return "", "picture is no PNG, JPEG or WebP"
    if sides is None:
        return "", "damaged picture"
    if not all(0 < side <= MOST_PIXELS for side in sides):
        return "", "picture too large to show"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}", ""


def _look(data: bytes) -> tuple[str, tuple[int, int] | None]:
    """Format and (width, height) by the bytes; "" if it is none of the three."""
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png", _big(data[16:20], data[20:24]) if data[12:16] == b"IHDR" else None
    if data[:3] == b"\xff\xd8\xff":
        return "jpeg", _jpeg_sides(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp", _webp_sides(data)
    return "", None


def _big(width: bytes, height: bytes) -> tuple[int, int]:
    return int.from_bytes(width, "big"), int.from_bytes(height, "big")


def _jpeg_sides(data: bytes) -> tuple[int, int] | None:
    """Of the frame header; segments before it are passed over."""
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        if data[at + 1] in _FRAMES:
            return _big(data[at + 7 : at + 9], data[at + 5 : at + 7])
        at += 2 + max(2, int.from_bytes(data[at + 2 : at + 4], "big"))
    return None


def _webp_sides(data: bytes) -> tuple[int, int] | None:
    """Of the first chunk: extended, lossless or lossy."""
    if len(data) < 30:
        return None
    little = int.from_bytes
    if data[12:16] == b"VP8X":
        return 1 + little(data[24:27], "little"), 1 + little(data[27:30], "little")
    if data[12:16] == b"VP8L" and data[20] == 0x2F:
        bits = little(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if data[12:16] == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        return little(data[26:28], "little") & 0x3FFF, little(data[28:30], "little") & 0x3FFF
    return None
