"""Adapters are small: all their files are made in memory and appear together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from loratool import __version__
from loratool.adapter import AdapterFiles, TensorData, TensorRef
from loratool.errors import AlreadyMadeError
from loratool.plan import plain
from loratool.store.disk import check_space
from loratool.store.header import build_header
from loratool.store.jsonfile import dump_json
from loratool.store.reader import FileReader, stamp_of
from loratool.store.shard_writer import ShardWriter
from loratool.store.stamps import take_stamps
from loratool.store.writer import MARKER, StagedOutput


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
    stamps = take_stamps(s for _, s in files.tensors if isinstance(s, TensorRef))
    others = dict(_extra_files(extras))
    stamps |= {path: stamp for path in others.values() if (stamp := stamp_of(path))}
    try:
        with StagedOutput(
            target, is_folder=True, plan_id=_identity(files, record), force=force, inputs=stamps,
            names=[*others, *adapter_names(files)],
        ) as output:  # fmt: skip
            for name, path in others.items():
                output.copy_file(name, path)
            size = fill_adapter(output, files)
            output.commit(record)
            return size
    except AlreadyMadeError:
        return file_bytes(files)


def adapter_names(files: AdapterFiles) -> list[str]:
    """Names of the files that an adapter becomes."""
    return [files.tensor_file, *files.json_files, MARKER]


def _identity(files: AdapterFiles, record: Mapping[str, Any]) -> str:
    """What tells an adapter to be written from others, with the stamps of its inputs."""
    text = json.dumps([plain(files), dict(record), __version__], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _extra_files(extras: Iterable[Path]) -> Iterator[tuple[str, Path]]:
    for extra in extras:
        for path in sorted(extra.rglob("*")) if extra.is_dir() else [extra]:
            if path.is_file():
                yield path.relative_to(extra.parent).as_posix(), path


def file_bytes(files: AdapterFiles) -> int:
    """Size of the tensor file that would be written."""
    header, _ = build_header([(n, s.dtype, s.shape) for n, s in files.tensors], files.metadata)
    return len(header) + sum(s.nbytes for _, s in files.tensors)


def fill_adapter(output: StagedOutput, files: AdapterFiles) -> int:
    """Write the files of an adapter; returns the size of the tensor file in bytes."""
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
        output.place(files.tensor_file, writer.pieces())
        for name, value in files.json_files.items():
            output.write_file(name, dump_json(value))
        reader.check_unchanged()
    return size
