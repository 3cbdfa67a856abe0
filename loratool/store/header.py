"""The header of a safetensors file, read without trusting it and written byte for byte.

Everything is checked before any tensor byte is used, and every size before anything of that
size is allocated.  The rules are those of the safetensors library and stricter: no duplicate
keys, no nameless tensors, limits on counts and lengths.
"""

from __future__ import annotations

import gc
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

from loratool.adapter import Stamp, TensorRef
from loratool.dtypes import DTYPES, tensor_bytes
from loratool.errors import BadFileError, DiskError, list_some
from loratool.frozen import Frozen
from loratool.lazy import regex
from loratool.location import Location, path_of
from loratool.store.contained import open_inside
from loratool.store.foreign import refuse_foreign
from loratool.store.jsonfile import (
    MARKS,
    MAX_TEXT_BYTES,
    DuplicateKeyError,
    count_marks,
    refuse_constant,
    text_bytes,
    unique_pairs,
)
from loratool.store.stamps import stamp_from
from loratool.store.stubs import remote_file

if TYPE_CHECKING:
    from loratool.plan import TensorSpec

MAX_HEADER_BYTES = 32 << 20  # default; --max-header raises it up to the next line
HARD_HEADER_BYTES = 100_000_000  # the safetensors library refuses more
MAX_TENSORS = 200_000
MAX_NAME = 1024  # characters
MAX_DIMS = 8
MAX_METADATA = 1_000_000  # characters of one metadata value

MAX_ENTRIES = 10_000  # of metadata
# A tensor has one object, two lists, at most twelve commas and few fields; the rest is metadata.
_MAX_OBJECTS = MAX_TENSORS + 2
_MAX_LISTS = 2 * MAX_TENSORS
_FIRST_METADATA = regex(rb'\{\s*"__metadata__"\s*:\s*')
_PARTS = dict.fromkeys(("dtype", "shape", "data_offsets"))  # of a tensor's entry
_WHOLE = {int}  # bool is no int here
_MAX_COMMAS, _MAX_COLONS = 12, 6  # per object, and one per entry of metadata
_MINUS_ZERO = regex(rb"-0\s*[,\]}]")
_AS_ZERO = bytes.maketrans(b"123456789", b"0" * 9)


class Header(Frozen):
    """What a safetensors file says about itself, checked.

    Attributes:
        path: the file.
        metadata: string metadata, in file order.
        tensors: in offset order; they cover the rest of the file exactly.
        raw: length prefix and JSON as in the file.
        data_start: absolute offset of the first tensor byte.
        file_size: size of the file in bytes (of a stub: of the file on the Hub).
    """

    path: Path
    metadata: Mapping[str, str]
    tensors: tuple[TensorRef, ...]
    raw: bytes
    data_start: int
    file_size: int


def read_header(
    path: Path, *, max_bytes: int = MAX_HEADER_BYTES, folder: Path | None = None
) -> Header:
    """Read and check the header of a safetensors file.

    Args:
        path: the file.
        max_bytes: largest header accepted (never more than 100 MB).
        folder: what it belongs to (`loratool.store.contained`); None = the folder it lies in.

    Raises:
        BadFileError: missing, damaged, truncated or another kind of file.
        UnsafeContentError: pickle, not a regular file, or a link that leads out of the folder.
        DiskError: the system refuses to read it.

    Example:
        >>> read_header(Path("style/adapter_model.safetensors")).tensors[0].shape
        (8, 160)
    """
    found = read_raw(path, max_bytes=max_bytes, folder=folder)
    with uncollected():
        return _checked(found, max_bytes)


class RawHeader(Frozen):
    """The header of a file as it stands there.

    Attributes:
        where: the file.
        raw: length prefix and JSON.
        size: of the whole file in bytes.
        stamp: of the file.
    """

    where: Location
    raw: bytes
    size: int
    stamp: Stamp


def read_raw(
    path: Path, *, max_bytes: int = MAX_HEADER_BYTES, folder: Path | None = None
) -> RawHeader:
    """Read a header without looking into it; arguments and errors are those of `read_header`."""
    remote = remote_file(path)
    where: Location = remote or path
    try:
        with open_inside(path, folder, shown=where) as file:
            stamp = stamp_from(os.fstat(file.fileno()))
            size = remote.size if remote else stamp[2]
            raw = _read_raw(file, where, size, min(max_bytes, HARD_HEADER_BYTES))
    except OSError as error:
        raise DiskError("LT-601", "cannot read", file=where, got=error.strerror) from error
    return RawHeader(where, raw, size, stamp)


def table_of(raw: bytes) -> bytes | None:
    """What stands behind the metadata of a header: the table of its tensors.

    Headers that end in the same table have the same tensors.  None where the metadata do not
    come first.

    Args:
        raw: of a header that was checked.
    """
    text = raw[8:].rstrip(b" ")
    start = _FIRST_METADATA.match(text)
    if start is None:
        return None if b'"__metadata__"' in text else text
    whole = str(memoryview(text)[start.end() :], "utf-8")
    return whole[json.JSONDecoder().raw_decode(whole)[1] :].encode()


def metadata_before(found: RawHeader, table: bytes) -> Mapping[str, str] | None:
    """The metadata of a header that ends in a known table; None for any other header.

    Args:
        found: a header that nobody has looked into.
        table: of `table_of`, of a header that was checked.

    Raises:
        BadFileError: the metadata are damaged.
    """
    text = found.raw[8:].rstrip(b" ")
    if not text.endswith(table):
        return None
    text = text[: len(text) - len(table)]
    start = _FIRST_METADATA.match(text)
    if start is None:
        return None if text else {}
    entries = _parse(b" " * 8 + b'{"__metadata__":' + text[start.end() :] + b"}", found.where)
    return _check_metadata(entries["__metadata__"], found.where, MAX_METADATA)


@contextmanager
def uncollected() -> Iterator[None]:
    """Pause the search for reference cycles: headers and plans make none, only small objects."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _checked(found: RawHeader, max_bytes: int) -> Header:
    shown, raw, size = found.where, found.raw, found.size
    if max_bytes <= MAX_HEADER_BYTES and text_bytes(raw) > MAX_TEXT_BYTES:
        raise BadFileError(
            "LT-304", "header is too large", file=shown, got=f"{text_bytes(raw)} bytes",
            expected=f"at most {MAX_TEXT_BYTES} bytes of memory", hint="--max-header 64MB",
        )  # fmt: skip
    entries = _parse(raw, shown)
    # Who raises the limit of the header knows that the file is unusual.
    longest = MAX_METADATA if max_bytes <= MAX_HEADER_BYTES else max_bytes
    metadata = _check_metadata(entries.pop("__metadata__", {}), shown, longest)
    if len(entries) > MAX_TENSORS:
        _refuse_count(shown, len(entries))
    tensors = [
        _tensor(shown, found.stamp, name, entry, len(raw)) for name, entry in entries.items()
    ]
    tensors.sort(key=lambda ref: (ref.start, ref.nbytes))
    _check_cover(tensors, shown, len(raw), size)
    return Header(path_of(shown), metadata, tuple(tensors), raw, len(raw), size)


def build_header(
    tensors: Sequence[TensorSpec | tuple[str, str, tuple[int, ...]]],
    metadata: Mapping[str, str],
    *,
    align: int = 8,
) -> tuple[bytes, tuple[int, ...]]:
    """The header bytes of a new file, and where each tensor starts in it.

    Tensors lie in the given order without gaps; equal arguments give equal bytes.

    Args:
        tensors: `loratool.plan.TensorSpec` or (name, dtype, shape).
        metadata: string metadata, written first and in the given order; none if empty.
        align: the JSON is padded with spaces so that the data start at a multiple of this.

    Raises:
        BadFileError: a name occurs twice or is reserved, or the header would be over 100 MB.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    starts: list[int] = []
    end = 0
    for one in tensors:
        name, dtype, shape = one if isinstance(one, tuple) else (one.name, one.dtype, one.shape)
        if name in entries or name == "__metadata__":
            raise BadFileError("LT-306", "duplicate or reserved tensor name", key=name)
        begin, end = end, end + tensor_bytes(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        starts.append(begin)
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % align)
    if len(text) > HARD_HEADER_BYTES:
        raise BadFileError(
            "LT-304", "the header of the output would be too large",
            expected=f"at most {HARD_HEADER_BYTES} bytes", got=f"{len(text)} bytes",
        )  # fmt: skip
    header = len(text).to_bytes(8, "little") + text
    return header, tuple(len(header) + start for start in starts)


def short_name(name: str) -> str:
    """A tensor name fit for a message: printable for any terminal encoding, never endless."""
    clean = name.encode("utf-8", "backslashreplace").decode()
    return clean if len(clean) <= 100 else f"{clean[:100]}… ({len(name)} characters)"


def _read_raw(file: BinaryIO, shown: object, size: int, limit: int) -> bytes:
    if size < 8:
        raise BadFileError(
            "LT-301", "file is empty" if size == 0 else "file is too small", file=shown,
            expected="a safetensors file of at least 10 bytes", got=f"{size} bytes",
        )  # fmt: skip
    head = _read_exactly(file, min(size, 4096), shown)
    length = int.from_bytes(head[:8], "little")
    if head[8:9] != b"{" or length > size - 8 or length > limit:
        refuse_foreign(file, head, shown, size)
    if length > limit:
        is_absurd = length > HARD_HEADER_BYTES
        raise BadFileError(
            "LT-304",
            f"header is too large{': damaged, or not safetensors' if is_absurd else ''}",
            file=shown, expected=f"at most {limit} bytes", got=f"{length} bytes",
            hint=None if is_absurd else f"--max-header, at most {HARD_HEADER_BYTES}",
        )  # fmt: skip
    if length > size - 8:
        raise BadFileError(
            "LT-303", "header is longer than the file: truncated, or not safetensors", file=shown,
            expected=f"{length + 8} bytes for the header", got=f"{size} bytes",
            hint="download or copy the file again",
        )  # fmt: skip
    if length == 0 or head[8:9] != b"{":
        raise BadFileError(
            "LT-305", "header is not a JSON object", file=shown,
            expected="'{' at byte 8", got=repr(head[8:9])[1:] if length else "an empty header",
        )  # fmt: skip
    if len(head) >= length + 8:
        return head[: length + 8]
    file.seek(0)
    return _read_exactly(file, length + 8, shown)


def _has_odd_numbers(raw: bytes) -> bool:
    """True if `_plain_int` may be needed: for -0 and for more than 20 digits."""
    return _MINUS_ZERO.search(raw) is not None or b"0" * 21 in raw.translate(_AS_ZERO)


def _plain_int(text: str) -> int | float:
    # Anything but a plain non-negative 64-bit number becomes a float, which later checks refuse.
    return int(text) if text.isdigit() and len(text) <= 20 else float(text)


def _read_exactly(file: BinaryIO, count: int, shown: object) -> bytes:
    """Mostly one read and no copy: headers may be large."""
    data = file.read(count)
    while len(data) < count:
        part = file.read(count - len(data))
        if not part:
            raise BadFileError(
                "LT-303", "file ended while its header was read", file=shown,
                expected=f"{count} bytes", got=f"{len(data)} bytes",
            )  # fmt: skip
        data += part
    return data


def _parse(raw: bytes, shown: object) -> dict[str, Any]:
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
            and commas <= _MAX_COMMAS * tensors + MAX_ENTRIES
            and colons <= _MAX_COLONS * tensors + MAX_ENTRIES):  # fmt: skip
        return
    marks = count_marks(raw, 8)
    objects, lists = marks[b"{"], marks[b"["]
    if objects > _MAX_OBJECTS or lists > _MAX_LISTS:
        _refuse_count(shown, max(objects - 1, lists // 2))
    for mark, most in ((b",", _MAX_COMMAS), (b":", _MAX_COLONS)):
        if marks[mark] > most * objects + MAX_ENTRIES:
            raise BadFileError(
                "LT-349", "header has too many values for its tensors", file=shown,
                expected=f"at most {MAX_ENTRIES} entries of metadata",
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


def _check_metadata(value: object, shown: object, longest: int) -> Mapping[str, str]:
    if value is None:  # mlx writes null, and safetensors reads it as "none"
        return {}
    if not isinstance(value, dict):
        raise BadFileError(
            "LT-316", "metadata is not an object", file=shown, key="__metadata__",
            expected="an object of strings", got=type(value).__name__,
        )  # fmt: skip
    if len(value) > MAX_ENTRIES:
        raise BadFileError(
            "LT-349", "too many entries of metadata", file=shown, key="__metadata__",
            expected=f"at most {MAX_ENTRIES}", got=len(value),
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
