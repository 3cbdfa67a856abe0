"""Adapters are small: all their files are made in memory and appear together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from loratool.adapter import AdapterFiles, TensorData
from loratool.store.disk import check_space
from loratool.store.header import build_header
from loratool.store.jsonfile import dump_json
from loratool.store.reader import FileReader
from loratool.store.shard_writer import ShardWriter
from loratool.store.stamps import take_stamps
from loratool.store.writer import MARKER, StagedOutput


def write_adapter(
    files: AdapterFiles,
    target: Path,
    *,
    record: Mapping[str, Any],
    force: bool = False,
    extras: Iterable[Path] = (),
) -> int:
    """Write an adapter folder, whole or not at all.

    Args:
        files: tensors and JSON files.
        target: folder to create.
        record: provenance, written as ``loratool.json``.
        force: replace an earlier loratool output.
        extras: small files and folders of them (tokenizer, licence) copied along.

    Returns:
        Size of the tensor file in bytes.
    """
    with stage_adapter(target, force=force) as output:
        return fill_adapter(output, files, record=record, extras=extras)


def stage_adapter(target: Path, *, force: bool = False) -> StagedOutput:
    """Claim the place of an adapter before the long work on it.

    Raises:
        OutputError: the place is taken, or an interrupted run of another command holds it.
        DiskError: it cannot be written to.
    """
    return StagedOutput(target, is_folder=True, plan_id=None, force=force)


def fill_adapter(
    output: StagedOutput,
    files: AdapterFiles,
    *,
    record: Mapping[str, Any],
    extras: Iterable[Path] = (),
) -> int:
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
                    buffer = memoryview(bytearray(source.nbytes))
                    reader.read_into(source.file, source.start, buffer)
                    writer.put(start, buffer)
            writer.finish()
        finally:
            writer.close()
        output.place(files.tensor_file)
        for name, value in files.json_files.items():
            output.write_file(name, dump_json(value))
        for path in extras:
            for one in sorted(path.rglob("*")) if path.is_dir() else [path]:
                if one.is_file():
                    output.write_file(str(one.relative_to(path.parent)), one.read_bytes())
        output.write_file(MARKER, dump_json(dict(record) or {"loratool": True}))
        reader.check_unchanged()
    output.commit()
    return size
