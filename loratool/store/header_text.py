"""What the JSON of a safetensors header says: parsed within bounds, every entry checked."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

from loratool.adapter import Stamp, TensorRef
from loratool.dtypes import DTYPES
from loratool.errors import BadFileError, list_some
from loratool.lazy import regex
from loratool.location import Location
from loratool.store.jsonfile import (
    MARKS,
    DuplicateKeyError,
    count_marks,
    refuse_constant,
    unique_pairs,
)

MAX_TENSORS = 200_000
MAX_NAME = 1024  # characters
MAX_DIMS = 8

_MAX_ENTRIES = 10_000  # of metadata
# A tensor has one object, two lists, at most twelve commas and few fields; the rest is metadata.
_MAX_OBJECTS = MAX_TENSORS + 2
_MAX_LISTS = 2 * MAX_TENSORS
_MAX_COMMAS, _MAX_COLONS = 12, 6  # per object, and one per entry of metadata
_PARTS = dict.fromkeys(("dtype", "shape", "data_offsets"))  # of a tensor's entry
_WHOLE = {int}  # bool is no int here
_MINUS_ZERO = regex(rb"-0\s*[,\]}]")
_AS_ZERO = bytes.maketrans(b"123456789", b"0" * 9)


def short_name(name: str) -> str:
    """A tensor name fit for a message: printable for any terminal encoding, never endless."""
    clean = name.encode("utf-8", "backslashreplace").decode()
    return clean if len(clean) <= 100 else f"{clean[:100]}… ({len(name)} characters)"


def _has_odd_numbers(raw: bytes) -> bool:
    """True if `_plain_int` may be needed: for -0 and for more than 20 digits."""
    return _MINUS_ZERO.search(raw) is not None or b"0" * 21 in raw.translate(_AS_ZERO)


def _plain_int(text: str) -> int | float:
    # Anything but a plain non-negative 64-bit number becomes a float, which later checks refuse.
    return int(text) if text.isdigit() and len(text) <= 20 else float(text)


def parse(raw: bytes, shown: object) -> dict[str, Any]:
    """The entries of a header: metadata, and what is said of each tensor.

    Args:
        raw: length prefix and JSON.
        shown: the file, in errors.

    Raises:
        BadFileError: LT-305 no JSON, LT-306 a key twice, LT-309 and LT-349 too much of anything.
    """
    _check_counts(raw, shown)
    try:
        text = str(memoryview(raw)[8:], "utf-8")
        entries = json.loads(
            text, object_pairs_hook=unique_pairs, parse_constant=refuse_constant,
            parse_int=_plain_int if _has_odd_numbers(raw) else None,
        )  # fmt: skip
    except UnicodeDecodeError as error:
        raise BadFileError(
            "LT-305", "header is not UTF-8", file=shown, got=f"byte {8 + error.start}"
        ) from error
    except DuplicateKeyError as error:
        raise BadFileError(
            "LT-306", "duplicate key in the header", file=shown, key=short_name(str(error))
        ) from error
    except json.JSONDecodeError as error:
        where = 8 + len(text[: error.pos].encode())
        raise BadFileError(
            "LT-305", "header is not JSON", file=shown, got=f"{error.msg} at byte {where}"
        ) from error
    except RecursionError as error:
        raise BadFileError("LT-305", "header is nested too deeply", file=shown) from error
    except ValueError as error:
        raise BadFileError("LT-305", "header is not JSON", file=shown, got=str(error)) from error
    assert isinstance(entries, dict)  # it starts with "{"
    return entries


def _check_counts(raw: bytes, shown: object) -> None:
    """Bound what parsing can allocate: structure outside strings is counted first."""
    objects, lists, commas, colons = map(raw.count, MARKS)  # at most so many, with those in strings
    tensors = min(objects, raw.count(b'"data_offsets":'))
    if (objects <= _MAX_OBJECTS and lists <= _MAX_LISTS
            and commas <= _MAX_COMMAS * tensors + _MAX_ENTRIES
            and colons <= _MAX_COLONS * tensors + _MAX_ENTRIES):  # fmt: skip
        return
    marks = count_marks(raw, 8)
    objects, lists = marks[b"{"], marks[b"["]
    if objects > _MAX_OBJECTS or lists > _MAX_LISTS:
        _refuse_count(shown, max(objects - 1, lists // 2))
    for mark, most in ((b",", _MAX_COMMAS), (b":", _MAX_COLONS)):
        if marks[mark] > most * objects + _MAX_ENTRIES:
            raise BadFileError(
                "LT-349", "header has too many values for its tensors", file=shown,
                expected=f"at most {_MAX_ENTRIES} entries of metadata",
                got=f"{marks[mark]} times {mark.decode()!r} for {objects} objects",
            )  # fmt: skip


def _refuse_count(shown: object, count: int) -> NoReturn:
    raise BadFileError(
        "LT-309", "too many tensors", file=shown, expected=f"at most {MAX_TENSORS}",
        got=f"about {count}",
    )  # fmt: skip


def _is_clean(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def check_metadata(value: object, shown: object, longest: int) -> Mapping[str, str]:
    """The metadata of a header, which are strings and not too many.

    Args:
        value: as parsed.
        shown: the file, in errors.
        longest: characters of a value.

    Raises:
        BadFileError: LT-316 no strings, LT-346 too long, LT-349 too many.
    """
    if value is None:  # mlx writes null, and safetensors reads it as "none"
        return {}
    if not isinstance(value, dict):
        raise BadFileError(
            "LT-316", "metadata is not an object", file=shown, key="__metadata__",
            expected="an object of strings", got=type(value).__name__,
        )  # fmt: skip
    if len(value) > _MAX_ENTRIES:
        raise BadFileError(
            "LT-349", "too many entries of metadata", file=shown, key="__metadata__",
            expected=f"at most {_MAX_ENTRIES}", got=len(value),
        )  # fmt: skip
    for key, item in value.items():
        if len(key) > MAX_NAME:
            raise BadFileError(
                "LT-346", "metadata key is too long", file=shown,
                key=f"__metadata__.{short_name(key)}", expected=f"at most {MAX_NAME} characters",
                got=f"{len(key)} characters",
            )  # fmt: skip
        if not isinstance(item, str) or not _is_clean(key) or not _is_clean(item):
            raise BadFileError(
                "LT-316", "metadata value is not a string", file=shown,
                key=f"__metadata__.{short_name(key)}", expected="a string of Unicode characters",
                got="half a surrogate pair" if isinstance(item, str) else type(item).__name__,
            )  # fmt: skip
        if len(item) > longest:
            raise BadFileError(
                "LT-346", "metadata value is too long", file=shown,
                key=f"__metadata__.{short_name(key)}",
                expected=f"at most {longest} characters", got=f"{len(item)} characters",
                hint="--max-header 64MB lifts this limit too",
            )  # fmt: skip
    return value


def tensors_of(
    entries: Mapping[str, object], shown: Location, stamp: Stamp, start: int, size: int
) -> tuple[TensorRef, ...]:
    """The tensors of a file in offset order, which fill it.

    Args:
        entries: as parsed, without metadata.
        shown: the file.
        stamp: of the file.
        start: absolute offset of the first tensor byte.
        size: of the whole file in bytes.

    Raises:
        BadFileError: LT-307 … LT-311, no such tensor can be; LT-312 … LT-315, they do not fill it.
    """
    if len(entries) > MAX_TENSORS:
        _refuse_count(shown, len(entries))
    tensors = [_tensor(shown, stamp, name, entry, start) for name, entry in entries.items()]
    tensors.sort(key=lambda ref: (ref.start, ref.nbytes))
    _check_cover(tensors, shown, start, size)
    return tuple(tensors)


def _are_whole(values: list[Any]) -> bool:
    # A number of more than 64 bits is none that a size can be.
    return not values or (_WHOLE.issuperset(map(type, values))
                          and min(values) >= 0 and max(values) < 1 << 64)  # fmt: skip


def _tensor(shown: Location, stamp: Stamp, name: str, entry: object, data_start: int) -> TensorRef:
    def refuse(code: str, what: str, expected: object = None, got: object = None) -> NoReturn:
        raise BadFileError(code, what, file=shown, key=short_name(name), expected=expected, got=got)

    if not name or len(name) > MAX_NAME or not (name.isascii() or _is_clean(name)):
        refuse("LT-308", "unusable tensor name", f"1 to {MAX_NAME} Unicode characters",
               "half a surrogate pair" if 0 < len(name) <= MAX_NAME else f"{len(name)} characters",
        )  # fmt: skip
    if not isinstance(entry, dict):
        refuse("LT-307", "tensor entry is not an object", "an object", type(entry).__name__)
    if not entry.keys() >= _PARTS.keys():
        refuse("LT-307", "tensor entry is incomplete", ", ".join(_PARTS),
               f"no {list_some([k for k in _PARTS if k not in entry])}")  # fmt: skip
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        refuse("LT-310", "unknown dtype", ", ".join(DTYPES), short_name(str(dtype)))
    if not isinstance(shape, list) or not _are_whole(shape):
        refuse("LT-307", "shape is not a list of sizes", "whole numbers ≥ 0",
               short_name(str(shape)))  # fmt: skip
    if len(shape) > MAX_DIMS:
        refuse("LT-309", "too many dimensions", f"at most {MAX_DIMS}", len(shape))
    if (not isinstance(offsets, list) or len(offsets) != 2
            or not _are_whole(offsets)):  # fmt: skip
        refuse("LT-307", "data_offsets is not a pair of positions", "two whole numbers ≥ 0",
               short_name(str(offsets)))  # fmt: skip
    begin, end = offsets
    if begin > end:
        refuse("LT-307", "data_offsets end before they begin", "begin ≤ end", offsets)
    bits = DTYPES[dtype].bits
    whole = bits * math.prod(shape)
    if (whole or bits * math.prod(filter(None, shape))) >= 1 << 63:
        refuse("LT-311", "shape is too large for any file", "less than 2^63 bits", shape)
    if whole % 8:
        refuse("LT-311", "packed tensor does not fill whole bytes", "a multiple of 8 bits", whole)
    nbytes = whole // 8
    if end - begin != nbytes:
        refuse("LT-311", "byte range does not fit shape and dtype",
               f"{nbytes} bytes ({dtype} {shape})", f"{end - begin} bytes")  # fmt: skip
    return TensorRef(shown, name, dtype, tuple(shape), data_start + begin, nbytes, stamp)


def _check_cover(tensors: list[TensorRef], shown: object, start: int, size: int) -> None:
    """The tensors must follow each other without hole or overlap up to the end of the file."""
    end = start
    for number, ref in enumerate(tensors):
        stop = ref.start + ref.nbytes
        if ref.start == end and stop <= size:
            end = stop
            continue
        name = short_name(ref.name)
        before = short_name(tensors[number - 1].name) if number else "the header"
        if ref.start < end:
            raise BadFileError(
                "LT-314", f"tensors overlap: {before} and {name}", file=shown, key=name,
                expected=f"begin at {end - start}", got=f"begin at {ref.start - start}",
            )  # fmt: skip
        if ref.start > end:
            raise BadFileError(
                "LT-315", f"hole of {ref.start - end} bytes before a tensor", file=shown, key=name,
                expected=f"begin at {end - start} (end of {before})",
                got=f"begin at {ref.start - start}",
            )  # fmt: skip
        raise BadFileError(
            "LT-312", "truncated: a tensor ends past the end of the file", file=shown,
            key=name, expected=f"{tensors[-1].start + tensors[-1].nbytes} bytes in all",
            got=f"{size} bytes", hint="download or copy the file again",
        )  # fmt: skip
    if end < size:
        raise BadFileError(
            "LT-313", f"{size - end} extra bytes after the last tensor", file=shown,
            expected=f"{end} bytes", got=f"{size} bytes",
        )  # fmt: skip
