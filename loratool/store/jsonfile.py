"""JSON files from strangers, read strictly; JSON files of ours, written reproducibly."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from loratool.errors import BadFileError
from loratool.lazy import regex
from loratool.store.contained import read_small

MAX_JSON_BYTES = 16_000_000
MAX_DEPTH = 64
MAX_VALUES = 500_000  # brackets, commas and colons: what parsing can allocate follows from them
MAX_TEXT_BYTES = 80_000_000  # of the text in memory, where one emoji makes every letter four bytes
MAX_DIGITS = 40  # of a whole number

# Without backtracking; one that has no end reaches to the end.
_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)'
STRING = regex(_STRING, re.DOTALL)
_TOKEN = regex(_STRING + rb"|[\[\]{}]", re.DOTALL)
_WHOLE_TOKENS = regex(rb'(?:[^"]++|"[^"\\]*+(?:\\.[^"\\]*+)*+")*+', re.DOTALL)
_WINDOW = 1 << 20  # bytes
_SURROGATE = regex(rb"\\u[dD][89a-fA-F]")
_CONTINUED = bytes(range(0x80, 0xC0))  # all bytes of a UTF-8 character but the first
MARKS = (b"{", b"[", b",", b":")


class DuplicateKeyError(ValueError):
    """A key occurs twice in one object; the message is the key."""


def load_json(
    path: Path,
    *,
    folder: Path | None = None,
    max_bytes: int = MAX_JSON_BYTES,
    max_values: int = MAX_VALUES,
) -> dict[str, Any]:
    """Read a JSON file that holds one object.

    Args:
        path: the file.
        folder: what it belongs to (`loratool.store.contained`); None = the folder it lies in.
        max_bytes: largest file accepted.
        max_values: see `parse_json`.

    Raises:
        BadFileError: missing, too large, or see `parse_json`.
        UnsafeContentError: not a regular file, or a link that leads out of the folder.
        DiskError: the system refuses to read it.
    """

    def too_large() -> NoReturn:
        raise BadFileError(
            "LT-340", "JSON file is too large", file=path, expected=f"at most {max_bytes} bytes"
        )

    return parse_json(read_small(path, max_bytes, too_large, folder), path, max_values=max_values)


def parse_json(
    raw: bytes, file: object, *, key: str | None = None, max_values: int = MAX_VALUES
) -> dict[str, Any]:
    """The one object of a JSON text; counted before anything is built.

    Args:
        raw: the text.
        file: where it is from, for messages.
        key: where in the file.
        max_values: most brackets, commas and colons outside of strings.

    Raises:
        BadFileError: not UTF-8, not JSON, not an object, nested too deeply, too many values, a key
            twice in one object, or a number that is NaN, infinite or of too many digits.
    """
    check_json_size(raw, file, key, max_values)
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH:
        _check_depth(raw, file, key)
    try:
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=unique_pairs,
            parse_float=_finite,
            parse_int=_whole,
            parse_constant=refuse_constant,
        )
        if _SURROGATE.search(raw):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeError as error:
        where = f"byte {error.start}" if isinstance(error, UnicodeDecodeError) else "half a pair"
        raise BadFileError(
            "LT-341", "file is not UTF-8 text", file=file, key=key, got=where
        ) from error
    except DuplicateKeyError as error:
        raise BadFileError("LT-343", "a key occurs twice", file=file, key=error) from error
    except json.JSONDecodeError as error:
        got = f"{error.msg} at line {error.lineno} column {error.colno}"
        raise BadFileError("LT-342", "file is not JSON", file=file, key=key, got=got) from error
    except (ValueError, RecursionError) as error:
        raise BadFileError("LT-342", "file is not JSON", file=file, key=key, got=error) from error
    if not isinstance(value, dict):
        raise BadFileError(
            "LT-345", "file holds no JSON object", file=file, key=key,
            expected="an object", got=type(value).__name__,
        )  # fmt: skip
    return value


def check_json_size(raw: bytes | bytearray, file: object, key: str | None, max_values: int) -> None:
    """Bound what parsing a JSON text can allocate: see `parse_json`, but for the nesting.

    Raises:
        BadFileError: LT-340 too large in memory, LT-351 too many values.
    """
    if text_bytes(raw) > MAX_TEXT_BYTES:
        raise BadFileError(
            "LT-340", "JSON file is too large", file=file, key=key,
            expected=f"at most {MAX_TEXT_BYTES} bytes of memory", got=text_bytes(raw),
        )  # fmt: skip
    if sum(map(raw.count, MARKS)) > max_values:
        marks = sum(count_marks(raw).values())
        if marks > max_values:
            raise BadFileError(
                "LT-351", "JSON file holds too many values", file=file, key=key,
                expected=f"at most {max_values} brackets, commas and colons", got=marks,
            )  # fmt: skip


def _check_depth(raw: bytes, file: object, key: str | None) -> None:
    depth = 0
    for match in _TOKEN.finditer(raw):
        first = raw[match.start()]
        if first in b"[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise BadFileError(
                    "LT-344", "JSON is nested too deeply", file=file, key=key,
                    expected=f"at most {MAX_DEPTH} levels", got=f"byte {match.start()} is deeper",
                )  # fmt: skip
        elif first in b"]}":
            depth -= 1


def text_bytes(raw: bytes | bytearray) -> int:
    """What a UTF-8 text takes in memory: 1, 2 or 4 bytes for every character."""
    if 4 * len(raw) <= MAX_TEXT_BYTES or raw.isascii():
        return len(raw)
    length = len(raw.translate(None, _CONTINUED))
    return length * (4 if re.search(rb"[\xf0-\xff]", raw) else 2)


def count_marks(raw: bytes | bytearray, start: int = 0) -> dict[bytes, int]:
    """How often each of `MARKS` stands outside of strings; in windows, for memory's sake."""
    marks = dict.fromkeys(MARKS, 0)
    at = start
    while at < len(raw):
        whole = _WHOLE_TOKENS.match(raw, at, at + _WINDOW)
        end = whole.end() if whole else at
        if end == at:  # a string longer than the window, or one without an end
            long = STRING.match(raw, at)
            end = long.end() if long else len(raw)
        bare = STRING.sub(b"", raw[at:end])
        for mark in marks:
            marks[mark] += bare.count(mark)
        at = end
    return marks


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


def _whole(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"{text[:40]}… is too long a number")
    return int(text)
