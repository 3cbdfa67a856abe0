"""Adapters are small: all their files are made in memory and appear together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from loratool import __version__
from loratool.adapter import AdapterFiles, ArrangedRef, Source, TensorData, TensorRef
from loratool.errors import AlreadyMadeError
from loratool.frozen import replace
from loratool.plan import plain
from loratool.store.disk import check_space, refusals_as
from loratool.store.gguf_header import aligned, build_gguf_header
from loratool.store.header import build_header
from loratool.store.jsonfile import dump_json
from loratool.store.marker import MARKER, Content, content_of, file_metadata
from loratool.store.outputs import open_output
from loratool.store.reader import FileReader, plain_io
from loratool.store.series import Series
from loratool.store.shard_writer import ShardWriter
from loratool.store.staging import Making, Output
from loratool.store.stamps import known_stamp, stamp_of, take_stamps

Progress = Callable[[int, int], None]
T = TypeVar("T")

_PIECE = 8 << 20  # bytes copied at a time
_MANY_BYTES, _WRITERS = 64 << 20, 4  # from so many bytes on so many threads write them


def write_adapter(
    files: AdapterFiles,
    target: Path,
    *,
    record: Mapping[str, Any],
    read: Callable[[Path], T],
    extras: Mapping[str, Path] | None = None,
    force: bool = False,
    series: Series | None = None,
    progress: Progress | None = None,
) -> tuple[int, T]:
    """Write an adapter, a folder or one file, whole or not at all.

    Args:
        files: tensors and JSON files.
        target: folder or file to create.
        record: provenance: ``loratool.json`` of a folder, in the metadata of a file.
        read: called with where the adapter can be read, when it is complete.
        extras: name in the folder -> file to copy along (tokenizer, licence); a file has none.
        force: replace an earlier loratool output.
        series: that it is one of.
        progress: called with (bytes of tensors written, in all).

    Returns:
        Size of the tensor file in bytes, and what was read.
    """
    is_folder = bool(files.tensor_file)
    extras = (extras or {}) if is_folder else {}
    files = with_record(files, record)
    stamps = take_stamps(s for _, s in files.tensors if isinstance(s, TensorRef))
    names = [*extras, *adapter_names(files)] if is_folder else [files.tensor_file]
    beside = (known_stamp(path, stamp_of(path)) for path in extras.values())
    stamps |= {place: stamp for place, stamp in beside if stamp}
    try:
        with open_output(
            target,
            Making(
                is_folder=is_folder, plan_id=_identity(files, record), force=force,
                inputs=stamps, names=names, series=series,
                need_bytes=file_bytes(files) + sum(_size(p) for p in extras.values()),
            ),
        ) as output:  # fmt: skip
            for name, path in extras.items():
                output.copy_file(name, path)
            size = fill_adapter(output, files, progress)
            output.commit(record)
            return size, read(output.readable)
    except AlreadyMadeError:
        return file_bytes(files), read(target)


def with_record(files: AdapterFiles, record: Mapping[str, Any]) -> AdapterFiles:
    """A file that says itself what made it; a folder, and without a record a file, as they are."""
    if not record or files.tensor_file:
        return files
    return replace(files, metadata={**files.metadata, "loratool": json.dumps(record)})


def adapter_names(files: AdapterFiles) -> list[str]:
    """Names of the files that an adapter becomes."""
    return [files.tensor_file, *files.json_files, MARKER]


def _identity(files: AdapterFiles, record: Mapping[str, Any]) -> str:
    """What tells an adapter to be written from others, with the stamps of its inputs."""
    text = json.dumps([plain(files), dict(record), __version__], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def file_bytes(files: AdapterFiles) -> int:
    """Size of the tensor file that would be written, the record of a single file sealed."""
    metadata, data = files.metadata, content_of(_data_bytes(files), 0)
    if not files.tensor_file:
        metadata = file_metadata(metadata, data, hashlib.sha256().hexdigest())
    return _laid_out(files, metadata)[2]


def _laid_out(
    files: AdapterFiles, metadata: Mapping[str, str]
) -> tuple[bytes, tuple[int, ...], int]:
    """Header, where each tensor starts, and the size of the tensor file."""
    tensors = [(name, s.dtype, s.shape) for name, s in files.tensors]
    if files.numbers is not None:
        return build_gguf_header(tensors, metadata, files.numbers)
    header, starts = build_header(tensors, metadata)
    return header, starts, len(header) + _data_bytes(files)


def _data_bytes(files: AdapterFiles) -> int:
    """What lies behind the header: the tensors, in GGUF with the zeros between them."""
    sizes = (s.nbytes for _, s in files.tensors)
    return sum(sizes if files.numbers is None else map(aligned, sizes))


def entry_bytes(name: str, source: Source, size: int) -> int:
    """What a tensor takes in the header of a file of about this size."""
    header, _ = build_header([(name, source.dtype, source.shape)], {}, align=1)
    known = len(str(source.nbytes)) + 1  # digits of its offsets where it is the only one
    return len(header) - 9 - known + 2 * len(str(size))


def _size(path: Path) -> int:
    with refusals_as("cannot copy", path):
        return path.stat().st_size


def fill_adapter(output: Output, files: AdapterFiles, progress: Progress | None = None) -> int:
    """Write the files of an adapter; returns the size of the tensor file in bytes."""
    header, starts, size = _header(output, files, content_of(_data_bytes(files), 0))
    check_space(output.staging, size)
    stamps = take_stamps(s for _, s in files.tensors if not isinstance(s, TensorData))
    with FileReader(stamps) as reader:
        writer = ShardWriter(output.create(files.tensor_file), header, size)
        try:
            _put_all([s for _, s in files.tensors], starts, reader, writer, progress)
            _put_gaps([s for _, s in files.tensors], starts, size, writer)
            if not output.is_folder:
                writer.rewrite_header(_header(output, files, content_of(*writer.data_sum()))[0])
            writer.finish()
        finally:
            writer.close()
        output.place(files.tensor_file, writer.pieces())
        for name, value in files.json_files.items():
            output.write_file(name, dump_json(value))
        reader.check_unchanged()
    return size


def _header(
    output: Output, files: AdapterFiles, data: Content
) -> tuple[bytes, tuple[int, ...], int]:
    """Header, starts and size; the only file of an output says what it holds."""
    metadata = files.metadata
    if not output.is_folder:
        metadata = file_metadata(metadata, data, output.plan_id)
    return _laid_out(files, metadata)


def _put_gaps(
    sources: Sequence[Source], starts: Sequence[int], size: int, writer: ShardWriter
) -> None:
    """Zeros between the tensors, where there are gaps."""
    ends = (*starts[1:], size) if starts else ()
    for source, start, after in zip(sources, starts, ends, strict=True):
        end = start + source.nbytes
        if end < after:
            writer.put(end, memoryview(bytes(after - end)))


def _put_all(
    sources: Sequence[Source],
    starts: Sequence[int],
    reader: FileReader,
    writer: ShardWriter,
    progress: Progress | None,
) -> None:
    """Write every tensor; several at a time where that is worth it and allowed."""
    payload = sum(source.nbytes for source in sources)

    def put(source: Source, start: int) -> None:
        if isinstance(source, TensorData):
            writer.put(start, memoryview(source.data).cast("B"))
        else:
            _copy(reader, source, writer, start)

    def watch(written: Iterable[None]) -> None:
        done = 0
        for source, _ in zip(sources, written, strict=True):
            done += source.nbytes
            if progress is not None:
                progress(done, max(1, payload))

    if payload < _MANY_BYTES or plain_io():
        watch(map(put, sources, starts))
        return
    with ThreadPoolExecutor(_WRITERS) as pool:
        try:
            watch(pool.map(put, sources, starts))
        finally:
            pool.shutdown(cancel_futures=True)


def _copy(reader: FileReader, source: TensorRef, writer: ShardWriter, start: int) -> None:
    # One that lies in another order is read whole.
    step = source.nbytes if isinstance(source, ArrangedRef) else _PIECE
    buffer = memoryview(bytearray(min(step, source.nbytes)))
    for done in range(0, source.nbytes, step or 1):
        piece = buffer[: min(step, source.nbytes - done)]
        reader.read_into(source, done, piece)
        writer.put(start + done, piece)
