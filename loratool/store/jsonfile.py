"""JSON files from strangers, read strictly; JSON files of ours, written reproducibly."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from loratool.errors import BadFileError, DiskError
from loratool.store.contained import open_inside

MAX_JSON_BYTES = 16_000_000
MAX_DEPTH = 64

_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class DuplicateKeyError(ValueError):
    """A key occurs twice in one object; the message is the key."""


def load_json(
    path: Path,
    *,
    folder: Path | None = None,
    max_bytes: int = MAX_JSON_BYTES,
    max_depth: int = MAX_DEPTH,
) -> dict[str, Any]:
    """Read a JSON file that holds one object.

    Args:
        path: the file.
        folder: what it belongs to (`loratool.store.contained`); None = the folder it lies in.
        max_bytes: largest file accepted.
        max_depth: deepest nesting accepted.

    Raises:
        BadFileError: missing, too large, not UTF-8, not JSON, not an object, nested too deeply,
            a key twice in one object, or a number that is NaN or infinite.
        UnsafeContentError: not a regular file, or a link that leads out of the folder.
        DiskError: the system refuses to read it.
    """
    raw = _read(path, folder, max_bytes)
    _check_depth(raw, path, max_depth)
    try:
        text = raw.decode("utf-8")
        value = json.loads(
            text,
            object_pairs_hook=unique_pairs,
            parse_float=_finite,
            parse_constant=refuse_constant,
        )
        if _SURROGATE.search(raw):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeError as error:
        where = f"byte {error.start}" if isinstance(error, UnicodeDecodeError) else "half a pair"
        raise BadFileError("LT-341", "file is not UTF-8 text", file=path, got=where) from error
    except DuplicateKeyError as error:
        raise BadFileError("LT-343", "a key occurs twice", file=path, key=error) from error
    except json.JSONDecodeError as error:
        got = f"{error.msg} at line {error.lineno} column {error.colno}"
        raise BadFileError("LT-342", "file is not JSON", file=path, got=got) from error
    except (ValueError, RecursionError) as error:
        raise BadFileError("LT-342", "file is not JSON", file=path, got=error) from error
    if not isinstance(value, dict):
        raise BadFileError(
            "LT-345", "file holds no JSON object", file=path,
            expected="an object", got=type(value).__name__,
        )  # fmt: skip
    return value


def dump_json(value: Mapping[str, Any]) -> bytes:
    """The bytes of a JSON file: two spaces, ASCII, key order kept, one newline at the end.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode("ascii")


def unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An ``object_pairs_hook`` that refuses duplicate keys.

    Raises:
        DuplicateKeyError: a key occurs twice.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise DuplicateKeyError(key.encode("utf-8", "backslashreplace").decode())
            seen.add(key)
    return found


def refuse_constant(text: str) -> NoReturn:
    """A ``parse_constant`` that refuses NaN and infinities.

    Raises:
        ValueError: always.
    """
    raise ValueError(f"{text} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is too large a number")
    return number


def _read(path: Path, folder: Path | None, max_bytes: int) -> bytes:
    try:
        with open_inside(path, folder) as file:
            parts: list[bytes] = []
            left = max_bytes + 1
            while left and (part := file.read(min(left, 1 << 20))):
                parts.append(part)
                left -= len(part)
    except OSError as error:
        raise DiskError("LT-601", "cannot read", file=path, got=error.strerror) from error
    if not left:
        raise BadFileError(
            "LT-340", "JSON file is too large", file=path, expected=f"at most {max_bytes} bytes"
        )
    return b"".join(parts)


def _check_depth(raw: bytes, path: Path, max_depth: int) -> None:
    if raw.count(b"[") + raw.count(b"{") <= max_depth:
        return
    depth = 0
    for match in _TOKEN.finditer(raw):
        first = raw[match.start()]
        if first in b"[{":
            depth += 1
            if depth > max_depth:
                raise BadFileError(
                    "LT-344", "JSON is nested too deeply", file=path,
                    expected=f"at most {max_depth} levels", got=f"byte {match.start()} is deeper",
                )  # fmt: skip
        elif first in b"]}":
            depth -= 1
