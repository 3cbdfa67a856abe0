"""Adapters are small: all their files are made in memory and appear together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from loratool.adapter import AdapterFiles, TensorData, TensorRef
from loratool.store.disk import check_space
from loratool.store.foreign import open_regular
from loratool.store.header import build_header
from loratool.store.jsonfile import dump_json
from loratool.store.reader import FileReader
from loratool.store.shard_writer import ShardWriter
from loratool.store.stamps import take_stamps
from loratool.store.writer import MARKER, StagedOutput

_PIECE = 4 << 20  # bytes copied at a time


def write_adapter(
    files: AdapterFiles,
    target: Path,
    *,
    record: Mapping[str, Any],
    extras: Iterable[Path] = (),
    force: bool = False,
) -> int:
    """Write an adapter folder, whole or not at all.

    Args:
        files: tensors and JSON files.
        target: folder to create.
        record: provenance, written as ``loratool.json``.
        extras: files and folders to copy along (tokenizer, licence).
        force: replace an earlier loratool output.

    Returns:
        Size of the tensor file in bytes.
    """
    with stage_adapter(target, force=force) as output:
        for extra in extras:
            for path in sorted(extra.rglob("*")) if extra.is_dir() else [extra]:
                if path.is_file():
                    output.write_file(path.relative_to(extra.parent).as_posix(), read_whole(path))
        return fill_adapter(output, files, record=record)


def file_bytes(files: AdapterFiles) -> int:
    """Size of the tensor file that would be written."""
    header, _ = build_header([(n, s.dtype, s.shape) for n, s in files.tensors], files.metadata)
    return len(header) + sum(s.nbytes for _, s in files.tensors)


def read_whole(path: Path) -> bytes:
    """The bytes of a small regular file."""
    with open_regular(path) as file:
        return file.read()


def stage_adapter(target: Path, *, force: bool = False) -> StagedOutput:
    """Claim the place of an adapter before the long work on it.

    Raises:
        OutputError: the place is taken, or an interrupted run of another command holds it.
        DiskError: it cannot be written to.
    """
    return StagedOutput(target, is_folder=True, plan_id=None, force=force)


def fill_adapter(output: StagedOutput, files: AdapterFiles, *, record: Mapping[str, Any]) -> int:
    """Write the files of an adapter and make them appear; arguments as in `write_adapter`."""
    header, starts = build_header(
        [(name, s.dtype, s.shape) for name, s in files.tensors], files.metadata
    )
    size = len(header) + sum(s.nbytes for _, s in files.tensors)
    check_space(output.staging, size)
    stamps = take_stamps(s for _, s in files.tensors if not isinstance(s, TensorData))
    with FileReader(stamps) as reader:
        writer = ShardWriter(output.create(files.tensor_file), header, size)
        try:
            for (_, source), start in zip(files.tensors, starts, strict=True):
                if isinstance(source, TensorData):
                    writer.put(start, memoryview(source.data).cast("B"))
                else:
                    _copy(source, reader, writer, start)
            writer.finish()
        finally:
            writer.close()
        output.place(files.tensor_file)
        for name, value in files.json_files.items():
            output.write_file(name, dump_json(value))
        output.write_file(MARKER, dump_json(dict(record) or {"loratool": True}))
        reader.check_unchanged()
    output.commit()
    return size


def _copy(source: TensorRef, reader: FileReader, writer: ShardWriter, start: int) -> None:
    buffer = memoryview(bytearray(min(source.nbytes, _PIECE)))
    for done in range(0, source.nbytes, _PIECE):
        piece = buffer[: source.nbytes - done]
        reader.read_into(source.file, source.start + done, piece)
        writer.put(start + done, piece)
