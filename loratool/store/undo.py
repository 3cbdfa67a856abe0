"""Undo files: one packed patch per changed tensor, and a table of what they are for.

A safetensors file.  Each changed tensor has a ``U8`` tensor of its name that holds its patch; the
table, zlib-packed JSON, is the ``U8`` tensor `TABLE`.
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
from loratool.store.disk import disk_error
from loratool.store.header import build_header, read_header
from loratool.store.shard_writer import ShardWriter
from loratool.store.writer import StagedOutput

TABLE = "loratool.undo"
_MAX_TABLE = 256 << 20  # bytes, unpacked: 200,000 tensors with long names
_COPY = 8 << 20


@dataclass(frozen=True)
class Undo:
    """An undo file, opened.

    Attributes:
        path: the file.
        table: see `loratool.ops.undo`.
        patches: tensor name -> where its patch lies.
    """

    path: Path
    table: Mapping[str, Any]
    patches: Mapping[str, TensorRef]


def read_undo(path: Path) -> Undo:
    """Open an undo file.

    Raises:
        BadFileError: damaged, or not an undo file.
    """
    header = read_header(path)
    refs = {ref.name: ref for ref in header.tensors}
    ref = refs.pop(TABLE, None)
    if ref is None:
        raise BadFileError(
            "LT-329", "not an undo file", file=path, expected=f"a tensor {TABLE}",
            hint="merge --save-undo FILE writes one",
        )  # fmt: skip
    with path.open("rb") as file:
        file.seek(ref.start)
        packed = file.read(ref.nbytes)
    try:
        tool = zlib.decompressobj()
        text = tool.decompress(packed, _MAX_TABLE)
        table = json.loads(text) if tool.eof else None
    except (zlib.error, ValueError, RecursionError):
        table = None
    if not isinstance(table, dict) or set(table.get("tensors", ())) < set(refs):
        raise BadFileError("LT-328", "damaged undo file", file=path, key=TABLE)
    return Undo(path, table, refs)


class PatchSpool:
    """Patches on their way into an undo file: kept on disk, since there may be gigabytes.

    Args:
        output: staging area of the undo file.
    """

    def __init__(self, output: StagedOutput) -> None:
        self._output = output
        self._lock = threading.Lock()
        self._path = output.create(".patches")
        self._file: BinaryIO = self._path.open("w+b")
        self._places: dict[str, tuple[int, int]] = {}

    def add(self, name: str, payload: bytes) -> None:
        """Keep one patch; from any thread."""
        try:
            with self._lock:
                self._places[name] = (self._file.tell(), len(payload))
                self._file.write(payload)
        except OSError as error:
            raise disk_error("cannot write", self._path, error) from error

    def write(self, table: Mapping[str, Any], names: Sequence[str]) -> int:
        """Make the undo file, patches in the order of ``names``; returns its size."""
        packed = zlib.compress(json.dumps(table).encode(), 6)
        sizes = {name: self._places[name][1] for name in names}
        header, starts = build_header(
            [(TABLE, "U8", (len(packed),)), *((n, "U8", (s,)) for n, s in sizes.items())],
            {"loratool": json.dumps({"operation": "undo", "plan": table["plan"]})},
        )
        size = starts[-1] + (list(sizes.values()) or [len(packed)])[-1]
        writer = ShardWriter(self._output.create(""), header, size)
        try:
            writer.put(starts[0], memoryview(packed))
            for name, start in zip(names, starts[1:], strict=True):
                self._copy(writer, *self._places[name], start)
            writer.finish()
        finally:
            writer.close()
        self.close()
        self._path.unlink()
        self._output.place("")
        return size

    def _copy(self, writer: ShardWriter, at: int, size: int, start: int) -> None:
        self._file.seek(at)
        while size:
            piece = self._file.read(min(size, _COPY))
            writer.put(start, memoryview(piece))
            start, size = start + len(piece), size - len(piece)

    def close(self) -> None:
        """Let go of the spool."""
        self._file.close()


def plan_of(path: Path) -> str | None:
    """The plan that an existing undo file belongs to, None if it is none or damaged."""
    try:
        record = json.loads(read_header(path).metadata["loratool"])
        return str(record["plan"]) if record["operation"] == "undo" else None
    except (BadFileError, KeyError, ValueError, TypeError):
        return None
