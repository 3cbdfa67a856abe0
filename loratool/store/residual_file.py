"""The file that ``extract --save-residual`` writes and ``merge --residual`` reads.

A safetensors file.  Its metadata say what each tensor of TUNED is; the patches and whole tensors
lie in it under TUNED's names:

    NAME          whole: the tensor itself; patched: U8, the pages of its patch one after another
    NAME|pages    I64 (pages, 3): first element, number of elements, bytes of each page

A page is a `loratool.linalg.patch` against what the correctly rounded merge gives.
"""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratool.adapter import Source, TensorData, TensorRef
from loratool.dtypes import tensor_bytes
from loratool.errors import BadFileError
from loratool.store.disk import disk_error
from loratool.store.header import build_header, read_header
from loratool.store.reader import FileReader
from loratool.store.shard_writer import ShardWriter
from loratool.store.writer import StagedOutput

VERSION = 1
PAGES = "|pages"
_PIECE = 1 << 24

BIND_OPTIONS = ("resize_embeddings", "untie", "keep_tied")
"""What a merge must allow so that it gives what TUNED is."""

CONFIG_KEYS = ("dtype", "torch_dtype", "vocab_size", "tie_word_embeddings")
"""What ``config.json`` says about weights."""


@dataclass(frozen=True)
class ResidualTensor:
    """What a residual file says of one tensor of TUNED.

    Attributes:
        dtype: of TUNED.
        shape: of TUNED.
        digest: of TUNED's bits, block by block.
        whole: its bytes, if it is stored as it is.
        patch: pages of its patch, if the merge gets some elements otherwise.
        pages: where they are.
    """

    dtype: str
    shape: tuple[int, ...]
    digest: str
    whole: TensorRef | None = None
    patch: TensorRef | None = None
    pages: TensorRef | None = None


@dataclass(frozen=True)
class Residual:
    """A residual file, opened (header only).

    Attributes:
        path: the file.
        tensors: base-style checkpoint-wide name -> what TUNED has there, in TUNED's order.
        adapter: sha256 by file name of the adapter it goes with.
        bind: options that the merge needs: ``resize_embeddings``, ``untie``, ``keep_tied``.
        config: values of TUNED's ``config.json`` that differ from the base's and follow the
            weights.
    """

    path: Path
    tensors: Mapping[str, ResidualTensor]
    adapter: Mapping[str, str]
    bind: Mapping[str, bool] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)


def read_residual(path: Path) -> Residual:
    """Read the header of a residual file.

    Raises:
        BadFileError: not a residual file, of another version, or damaged.
    """
    header = read_header(path)
    refs = {ref.name: ref for ref in header.tensors}
    try:
        record = json.loads(header.metadata["loratool"])["residual"]
        if record["version"] != VERSION:
            raise BadFileError(
                "LT-397", "residual file of another version", file=path, expected=VERSION,
                got=record["version"],
            )  # fmt: skip
        tensors = {name: _tensor(name, entry, refs) for name, entry in record["tensors"].items()}
        bind = {key: bool(record["bind"].get(key, False)) for key in BIND_OPTIONS}
        config = {k: v for k, v in record["config"].items() if k in CONFIG_KEYS}
        return Residual(path, tensors, record["adapter"], bind, config)
    except (KeyError, TypeError, ValueError) as error:
        raise BadFileError(
            "LT-398", "this is no residual file", file=path, got=str(error),
            hint="extract --save-residual writes one",
        ) from error  # fmt: skip


def _tensor(name: str, entry: Mapping[str, Any], refs: Mapping[str, TensorRef]) -> ResidualTensor:
    form, shape = entry["form"], tuple(int(n) for n in entry["shape"])
    whole = refs[name] if form == "whole" else None
    if whole is not None and (whole.dtype, whole.shape) != (entry["dtype"], shape):
        raise ValueError(name)
    is_patched = form == "patched"
    return ResidualTensor(
        str(entry["dtype"]), shape, str(entry["digest"]), whole,
        refs[name] if is_patched else None, refs[name + PAGES] if is_patched else None,
    )  # fmt: skip


class ResidualWriter:
    """Collects patches in any order, then writes the file in TUNED's.

    Patches go to a spool file beside the output, so that memory holds none of them for long.

    Args:
        path: the file to create.
        force: it may replace an earlier loratool output.
    """

    def __init__(self, path: Path, *, force: bool = False) -> None:
        self.path = path
        self._output = StagedOutput(path, is_folder=False, plan_id=None, force=force)
        self._spool_path = self._output.create(".spool")
        self._spool = self._spool_path.open("w+b")
        self._lock = threading.Lock()
        self._patches: dict[str, tuple[int, list[tuple[int, int, int]]]] = {}

    def __enter__(self) -> ResidualWriter:
        self._output.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._spool.close()
        self._output.__exit__(*error)

    def put(self, name: str, pages: Sequence[tuple[int, int, bytes]]) -> None:
        """Take the pages (first element, elements, patch) of a tensor's patch."""
        with self._lock:
            try:
                start = self._spool.tell()
                for _, _, data in pages:
                    self._spool.write(data)
            except OSError as error:
                raise disk_error("cannot write", self._spool_path, error) from error
            self._patches[name] = (start, [(first, n, len(data)) for first, n, data in pages])

    def finish(
        self,
        tensors: Mapping[str, tuple[TensorRef, str, bool]],
        reader: FileReader,
        record: Mapping[str, Any],
    ) -> int:
        """Write the file and make it appear.

        Args:
            tensors: name -> (TUNED's tensor, digest, stored whole).
            reader: TUNED's files.
            record: provenance, and what `Residual` has beside the tensors.

        Returns:
            Its size.
        """
        entries: dict[str, Any] = {}
        specs: list[tuple[str, str, tuple[int, ...]]] = []
        sources: list[Source | tuple[int, int]] = []
        for name, (_, _, rows) in self._spooled():
            raw = b"".join(struct.pack("<3q", *row) for row in rows)
            specs.append((name + PAGES, "I64", (len(rows), 3)))
            sources.append(TensorData(name, "I64", (len(rows), 3), raw))
        for name, (start, nbytes, _) in self._spooled():
            specs.append((name, "U8", (nbytes,)))
            sources.append((start, nbytes))
        for name, (ref, digest, is_whole) in tensors.items():
            form = "whole" if is_whole else "patched" if name in self._patches else "equal"
            entries[name] = {
                "dtype": ref.dtype, "shape": list(ref.shape), "digest": digest, "form": form,
            }  # fmt: skip
            if is_whole:
                specs.append((name, ref.dtype, ref.shape))
                sources.append(ref)
        residual = {"version": VERSION, "tensors": entries, **record["residual"]}
        metadata = {"loratool": json.dumps({**record, "residual": residual})}
        header, starts = build_header(specs, metadata)
        size = len(header) + sum(tensor_bytes(dtype, shape) for _, dtype, shape in specs)
        writer = ShardWriter(self._output.create(""), header, size)
        try:
            for source, start in zip(sources, starts, strict=True):
                for offset, data in self._pieces(source, reader):
                    writer.put(start + offset, data)
            writer.finish()
        finally:
            writer.close()
        self._spool.close()
        self._spool_path.unlink()
        self._output.place("")
        self._output.commit()
        return size

    def _spooled(self) -> Iterator[tuple[str, tuple[int, int, list[tuple[int, int, int]]]]]:
        for name in sorted(self._patches):
            start, rows = self._patches[name]
            yield name, (start, sum(r[2] for r in rows), rows)

    def _pieces(
        self, source: Source | tuple[int, int], reader: FileReader
    ) -> Iterator[tuple[int, memoryview]]:
        if isinstance(source, TensorData):
            yield 0, memoryview(source.data).cast("B")
            return
        start, nbytes = source if isinstance(source, tuple) else (source.start, source.nbytes)
        for offset in range(0, nbytes, _PIECE):
            data = bytearray(min(_PIECE, nbytes - offset))
            if isinstance(source, tuple):
                self._spool.seek(start + offset)
                self._spool.readinto(data)
            else:
                reader.read_into(source.file, start + offset, memoryview(data))
            yield offset, memoryview(data)
