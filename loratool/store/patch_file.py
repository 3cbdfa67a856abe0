"""Patch files: what turns predictions of a checkpoint's tensors into the tensors, bit for bit.

A safetensors file.  Each tensor that the prediction misses has a ``U8`` tensor of its name that
holds its packed patch (`loratool.linalg.patch`); what the patches are for is a table, zlib-packed
JSON, in the ``U8`` tensor `TABLE`: metadata of safetensors are limited, and thousands of experts
need megabytes.  ``merge --save-undo`` and ``extract --save-residual`` write such files.
"""

from __future__ import annotations

import json
import threading
import zlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import (
    Annotated,
    Any,
    BinaryIO,
    Generic,
    Literal,
    NoReturn,
    Protocol,
    TypedDict,
    TypeVar,
)

from msgspec import Meta, Struct, field

from loratool.adapter import TensorRef
from loratool.dtypes import DTYPES
from loratool.errors import BadFileError
from loratool.frozen import Frozen
from loratool.shapes import Refuse, checked_json, fitting_json
from loratool.store.contained import typed
from loratool.store.disk import refusals_as
from loratool.store.header import build_header, read_header
from loratool.store.header_text import MAX_DIMS, MAX_TENSORS
from loratool.store.jsonfile import MAX_TEXT_BYTES, check_json_size
from loratool.store.marker import content_of, file_metadata
from loratool.store.reader import FileReader
from loratool.store.shard_writer import ShardWriter
from loratool.store.staging import Output

TABLE = "loratool.patches"
VERSION = 1
MAX_PACKED = 40_000_000  # bytes of the packed table; unpacked `MAX_TEXT_BYTES`
_MAX_MARKS = 24 * MAX_TENSORS  # of the table's JSON: a tensor has at most so many
_ROW = 400  # bytes of what a table says of one tensor, at most
_COPY = 8 << 20

Digest = Annotated[str, Meta(max_length=64)]
"""sha256, in hexadecimal digits."""

Shape = Annotated[tuple[Annotated[int, Meta(ge=0, lt=1 << 56)], ...], Meta(max_length=MAX_DIMS)]
"""Of a tensor."""

Config = dict[str, bool | int | float | str | list[str] | None]
"""Values of a ``config.json``."""


class Row(Struct, frozen=True):
    """What every table says of a tensor.

    Attributes:
        dtype: of the tensor.
        shape: of the tensor.
        how: ``from``, what predicts it: ``sum`` (of the inputs), ``same`` (one) or ``nothing``.
    """

    dtype: str
    shape: Shape
    how: Literal["sum", "same", "nothing"] = field(name="from")


class Table(Protocol):
    """What every table has."""

    @property
    def tensors(self) -> Mapping[str, Any]:
        """Name -> row."""


T = TypeVar("T", bound=Table)


class PatchFile(Frozen, Generic[T]):
    """A patch file, opened.

    Attributes:
        path: the file.
        table: see `loratool.ops.undo` and `loratool.ops.residual`.
        patches: tensor name -> where its patch lies.
        source: what keeps a file that lies elsewhere within reach.
    """

    path: Path
    table: T
    patches: Mapping[str, TensorRef]
    source: object = None


class _Made(TypedDict):
    operation: str


class _Version(TypedDict):
    version: Any


def read_patches(path: Path, operation: str, shape: type[T]) -> PatchFile[T] | None:
    """Open a patch file; None if it is not one of this operation.

    Args:
        path: the file.
        operation: that its metadata name.
        shape: of the table (`loratool.shapes`).

    Raises:
        BadFileError: LT-328 damaged, LT-397 of another version; see `check_json_size`.
    """
    path = typed(path)
    header = read_header(path)
    refs = {ref.name: ref for ref in header.tensors}
    ref = refs.pop(TABLE, None)
    made = fitting_json(header.metadata.get("loratool", ""), _Made)
    if ref is None or made is None or made["operation"] != operation:
        return None

    def refuse(key: str | None, expected: str, got: str | None) -> NoReturn:
        raise BadFileError(
            "LT-328", "damaged patch file", file=path, key=f"{TABLE}: {key}" if key else TABLE,
            expected=expected, got=got,
        )  # fmt: skip

    text = _unpack(ref, refuse)
    check_json_size(text, path, TABLE, _MAX_MARKS)
    version = checked_json(text, _Version, refuse)["version"]
    if version != VERSION:
        raise BadFileError("LT-397", "patch file of another version", file=path,
                           expected=VERSION, got=str(version)[:40])  # fmt: skip
    table = checked_json(text, shape, refuse)
    for name, row in table.tensors.items():
        if row.dtype not in DTYPES:
            refuse(f"tensors.{name[:100]}.dtype", ", ".join(DTYPES), row.dtype[:40])
    if not refs.keys() <= table.tensors.keys():
        refuse(
            "tensors", "every tensor of the file", f"no {min(refs.keys() - table.tensors.keys())}"
        )
    return PatchFile(path, table, refs)


def _unpack(ref: TensorRef, refuse: Refuse) -> bytearray:
    """The text of a table, never more than it may be."""
    if ref.dtype != "U8" or ref.nbytes > MAX_PACKED:
        refuse(None, f"at most {MAX_PACKED} bytes", f"{ref.dtype}, {ref.nbytes} bytes")
    packed = bytearray(ref.nbytes)
    with FileReader() as reader:
        reader.read_into(ref, 0, memoryview(packed))
    tool, text, rest = zlib.decompressobj(), bytearray(), bytes(packed)
    try:
        while not tool.eof and (part := tool.decompress(rest, 1 << 20)):
            text += part
            rest = tool.unconsumed_tail
            if len(text) > MAX_TEXT_BYTES:
                refuse(None, f"at most {MAX_TEXT_BYTES} bytes, unpacked", "more")
    except zlib.error:
        refuse(None, "zlib data", None)
    if not tool.eof:
        refuse(None, "zlib data with an end", None)
    return text


def require_room(names: Collection[str], path: Path) -> None:
    """Refuse, before the work, a table that could not be read again.

    Args:
        names: of its tensors.
        path: the file to be.

    Raises:
        BadFileError: LT-309.
    """
    size = sum(map(len, map(json.dumps, names))) + _ROW * len(names)
    if len(names) > MAX_TENSORS or size > MAX_TEXT_BYTES:
        raise BadFileError(
            "LT-309", "too many tensors for a patch file", file=path, got=len(names),
            expected=f"at most {MAX_TENSORS}, or {MAX_TEXT_BYTES} bytes of what is said of them",
        )  # fmt: skip


class PatchWriter:
    """Patches on their way into a file: kept on disk, since there may be gigabytes; a context.

    Args:
        output: staging area of the file.
    """

    def __init__(self, output: Output) -> None:
        self._output = output
        self._lock = threading.Lock()
        self._path = output.create(".patches")
        self._file: BinaryIO = self._path.open("w+b")
        self._places: dict[str, tuple[int, int]] = {}

    def __enter__(self) -> PatchWriter:
        return self

    def __exit__(self, *error: object) -> None:
        with refusals_as("cannot write", self._output.path):  # what the buffer still holds
            self._file.close()

    def add(self, name: str, pieces: Sequence[bytes]) -> None:
        """Keep one patch, unless it is empty; from any thread."""
        if not pieces:
            return
        with self._lock, refusals_as("cannot write", self._output.path):
            start = self._file.tell()
            for piece in pieces:
                self._file.write(piece)
            self._places[name] = (start, self._file.tell() - start)

    def write(self, table: Mapping[str, Any], record: Mapping[str, Any]) -> int:
        """Make the file, patches in the order of the table's ``tensors``; returns its size.

        Args:
            table: what the patches are for.
            record: into the file's metadata; ``operation`` says what kind of file it is.
        """
        with refusals_as("cannot write", self._output.path):
            self._file.flush()
        packed = zlib.compress(json.dumps({"version": VERSION, **table}).encode(), 6)
        names = [name for name in table["tensors"] if name in self._places]
        places = [self._places[name] for name in names]
        sizes = [len(packed), *(size for _, size in places)]
        tensors = [(n, "U8", (s,)) for n, s in zip([TABLE, *names], sizes, strict=True)]
        said = {"loratool": json.dumps(record)}
        header, starts = build_header(tensors, file_metadata(said, content_of(sum(sizes), 0)))
        writer = ShardWriter(self._output.create(""), header, starts[-1] + sizes[-1])
        try:
            writer.put(starts[0], memoryview(packed))
            for place, start in zip(places, starts[1:], strict=True):
                self._copy(writer, *place, start)
            whole = file_metadata(said, content_of(*writer.data_sum()))
            writer.rewrite_header(build_header(tensors, whole)[0])
            writer.finish()
        finally:
            writer.close()
        self._file.close()
        self._path.unlink()
        self._output.place("", writer.pieces())
        return writer.size

    def _copy(self, writer: ShardWriter, at: int, size: int, start: int) -> None:
        self._file.seek(at)
        while size:
            piece = self._file.read(min(size, _COPY))
            writer.put(start, memoryview(piece))
            start, size = start + len(piece), size - len(piece)
