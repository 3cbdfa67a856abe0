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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from loratool.adapter import TensorRef
from loratool.errors import BadFileError
from loratool.store.contained import typed
from loratool.store.disk import disk_error
from loratool.store.header import build_header, read_header
from loratool.store.marker import content_of, file_metadata
from loratool.store.reader import FileReader
from loratool.store.shard_writer import ShardWriter
from loratool.store.writer import StagedOutput

TABLE = "loratool.patches"
VERSION = 1
_MAX_TABLE = 256 << 20  # bytes, unpacked: a million tensors
_COPY = 8 << 20


@dataclass(frozen=True)
class PatchFile:
    """A patch file, opened.

    Attributes:
        path: the file.
        table: see `loratool.ops.undo` and `loratool.ops.residual`.
        patches: tensor name -> where its patch lies.
    """

    path: Path
    table: Mapping[str, Any]
    patches: Mapping[str, TensorRef]


def read_patches(path: Path, operation: str) -> PatchFile | None:
    """Open a patch file; None if it is not one of this operation.

    Raises:
        BadFileError: damaged.
    """
    path = typed(path)
    header = read_header(path)
    refs = {ref.name: ref for ref in header.tensors}
    ref = refs.pop(TABLE, None)
    if ref is None or _record(header.metadata).get("operation") != operation:
        return None
    packed = bytearray(ref.nbytes)
    with FileReader() as reader:
        reader.read_into(ref, 0, memoryview(packed))
    try:
        tool = zlib.decompressobj()
        text = tool.decompress(packed, _MAX_TABLE)
        table = json.loads(text) if tool.eof else None
    except (zlib.error, ValueError, RecursionError):
        table = None
    if not isinstance(table, dict):
        table = {}
    rows = table.get("tensors")
    if not isinstance(rows, dict) or not refs.keys() <= rows.keys():
        raise BadFileError("LT-328", "damaged patch file", file=path, key=TABLE)
    if table.get("version") != VERSION:
        raise BadFileError("LT-397", "patch file of another version", file=path,
                           expected=VERSION, got=table.get("version"))  # fmt: skip
    return PatchFile(path, table, refs)


def _record(metadata: Mapping[str, str]) -> Mapping[str, Any]:
    try:
        record = json.loads(metadata.get("loratool", "{}"))
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


class PatchWriter:
    """Patches on their way into a file: kept on disk, since there may be gigabytes; a context.

    Args:
        output: staging area of the file.
    """

    def __init__(self, output: StagedOutput) -> None:
        self._output = output
        self._lock = threading.Lock()
        self._path = output.create(".patches")
        self._file: BinaryIO = self._path.open("w+b")
        self._places: dict[str, tuple[int, int]] = {}

    def __enter__(self) -> PatchWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def add(self, name: str, pieces: Sequence[bytes]) -> None:
        """Keep one patch, unless it is empty; from any thread."""
        if not pieces:
            return
        try:
            with self._lock:
                start = self._file.tell()
                for piece in pieces:
                    self._file.write(piece)
                self._places[name] = (start, self._file.tell() - start)
        except OSError as error:
            raise disk_error("cannot write", self._path, error) from error

    def write(self, table: Mapping[str, Any], record: Mapping[str, Any]) -> int:
        """Make the file, patches in the order of the table's ``tensors``; returns its size.

        Args:
            table: what the patches are for.
            record: into the file's metadata; ``operation`` says what kind of file it is.
        """
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
