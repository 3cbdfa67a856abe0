"""The header of a safetensors file, read without trusting it and written byte for byte.

Everything is checked before any tensor byte is used, and every size before anything of that
size is allocated.  The rules are those of the safetensors library and stricter: no duplicate
keys, no nameless tensors, limits on counts and lengths.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from loratool.adapter import Stamp, TensorRef
from loratool.dtypes import tensor_bytes
from loratool.errors import BadFileError, DiskError
from loratool.frozen import Frozen
from loratool.lazy import regex
from loratool.location import Location, path_of
from loratool.store.contained import open_inside
from loratool.store.foreign import refuse_foreign
from loratool.store.header_text import check_metadata, parse, tensors_of
from loratool.store.jsonfile import MAX_TEXT_BYTES, text_bytes
from loratool.store.stamps import stamp_from
from loratool.store.stubs import remote_file

if TYPE_CHECKING:
    from loratool.plan import TensorSpec

MAX_HEADER_BYTES = 32 << 20  # default; --max-header raises it up to the next line
HARD_HEADER_BYTES = 100_000_000  # the safetensors library refuses more
MAX_METADATA = 1_000_000  # characters of one metadata value

_FIRST_METADATA = regex(rb'\{\s*"__metadata__"\s*:\s*')


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
    entries = parse(b" " * 8 + b'{"__metadata__":' + text[start.end() :] + b"}", found.where)
    return check_metadata(entries["__metadata__"], found.where, MAX_METADATA)


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
    entries = parse(raw, shown)
    # Who raises the limit of the header knows that the file is unusual.
    longest = MAX_METADATA if max_bytes <= MAX_HEADER_BYTES else max_bytes
    metadata = check_metadata(entries.pop("__metadata__", {}), shown, longest)
    tensors = tensors_of(entries, shown, found.stamp, len(raw), size)
    return Header(path_of(shown), metadata, tensors, raw, len(raw), size)


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
