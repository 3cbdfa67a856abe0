"""Bytes of input files, by position, into buffers that the caller owns.

No mmap: a source that shrinks while it is read must be an error, not SIGBUS.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from loratool.adapter import Source, TensorData, TensorRef
from loratool.errors import BadFileError, DiskError
from loratool.store import remote_spans
from loratool.store.remote import remote_file

_PIECE = 1 << 22  # bytes compared at a time
_FIRST_PIECE = 1 << 16

Stamp = tuple[int, int, int, int]
"""(device, inode, size, modification time in ns): differs if a file changed or was replaced."""


def plain_io() -> bool:
    """True where only seek/read/write may be used (other systems, or LORATOOL_PLAIN_IO=1)."""
    return os.environ.get("LORATOOL_PLAIN_IO") == "1" or not hasattr(os, "preadv")


class FileReader:
    """Positioned reads from any number of files, safe for several threads.

    Files are opened on first use and stay open.

    Args:
        stamps: what files were when their headers were read; they must still be that.
    """

    def __init__(self, stamps: Mapping[Path, Stamp] | None = None) -> None:
        self._stamps = dict(stamps or {})
        self._files: dict[Path, tuple[BinaryIO, Stamp]] = {}
        self._lock = threading.Lock()
        self._plain = plain_io()

    def __enter__(self) -> FileReader:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            for file, _stamp in self._files.values():
                file.close()
            self._files.clear()

    def read_into(self, path: Path, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the bytes at ``offset``.

        Raises:
            BadFileError: the file ends before the buffer is full.
            DiskError: the system refuses to read.
            HubError: the file is on the Hub, which does not give the bytes.
        """
        remote = remote_file(path)
        if remote is not None:
            buffer[:] = remote_spans.read(remote, offset, len(buffer))
            return
        file, _stamp = self._open(path)
        done = 0
        try:
            while done < len(buffer):
                got = self._read(file, offset + done, buffer[done:])
                if got == 0:
                    raise BadFileError(
                        "LT-331",
                        "file ended while it was read",
                        file=path,
                        expected=f"{len(buffer)} bytes at {offset}",
                        got=f"{done} bytes",
                        hint="the file changed during the run: do not write to inputs",
                    )
                done += got
        except OSError as error:
            raise DiskError("LT-601", "cannot read", file=path, got=error.strerror) from error

    @staticmethod
    def expect(ranges: Iterable[remote_spans.Range]) -> None:
        """Say what will be read: of files on the Hub neighbours then come in one request."""
        remote_spans.expect(ranges)

    def check_unchanged(self) -> None:
        """Compare every open file with what it was when it was opened.

        Raises:
            BadFileError: device, inode, size or modification time differ.
        """
        with self._lock:
            for path, (file, stamp) in self._files.items():
                if _stamp_of(os.fstat(file.fileno())) != stamp:
                    raise _changed(path)
            opened = {path: stamp for path, (_file, stamp) in self._files.items()}
            for path, stamp in (opened | self._stamps).items():
                if stamp_of(path) != stamp:
                    raise _changed(path)

    def _open(self, path: Path) -> tuple[BinaryIO, Stamp]:
        with self._lock:
            entry = self._files.get(path)
            if entry is None:
                try:
                    file = path.open("rb", buffering=0)
                except OSError as error:
                    raise DiskError(
                        "LT-601", "cannot read", file=path, got=error.strerror
                    ) from error
                stamp = _stamp_of(os.fstat(file.fileno()))
                if self._stamps.get(path, stamp) != stamp:
                    file.close()
                    raise _changed(path)
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
                entry = (file, stamp)
                self._files[path] = entry
            return entry

    def _read(self, file: BinaryIO, offset: int, buffer: memoryview) -> int:
        if not self._plain:
            return os.preadv(file.fileno(), [buffer], offset)
        with self._lock:
            file.seek(offset)
            return file.readinto(buffer) or 0  # type: ignore[attr-defined]


def stamp_of(path: Path) -> Stamp | None:
    """What a file is now; None if it cannot be found."""
    try:
        return _stamp_of(path.stat())
    except OSError:
        return None


def _changed(path: Path) -> BadFileError:
    return BadFileError(
        "LT-332",
        "input changed during the run",
        file=path,
        hint="run it again when nothing writes to it",
    )


def are_of_one_file(refs: Sequence[TensorRef]) -> bool:
    """True for the same bytes of files on the Hub that have one hash: no need to read them."""
    places = {(f.digest, r.start) if (f := remote_file(r.file)) else None for r in refs}
    return len(places) == 1 and None not in places


def have_same_bytes(sources: Sequence[Source]) -> bool:
    """True if tensors agree in type, shape and every bit; read piece by piece."""
    first = sources[0]
    if any((s.dtype, s.shape) != (first.dtype, first.shape) for s in sources):
        return False
    refs = [s for s in sources if isinstance(s, TensorRef)]
    if len(refs) < len(sources):
        return all(isinstance(s, TensorData) and s == first for s in sources)
    if are_of_one_file(refs):
        return True
    with FileReader() as reader:
        # What differs mostly does so at once, and may have to come from the Hub.
        ends = [min(_FIRST_PIECE, first.nbytes), *range(_PIECE, first.nbytes, _PIECE), first.nbytes]
        for start, end in zip([0, *ends], ends, strict=False):
            pieces = []
            for ref in refs:
                piece = bytearray(end - start)
                reader.read_into(ref.file, ref.start + start, memoryview(piece))
                pieces.append(piece)
            if any(piece != pieces[0] for piece in pieces):
                return False
    return True


def read_bytes(source: Source) -> bytes | memoryview:
    """All bytes of a tensor that is small enough to be held.

    Raises:
        BadFileError, DiskError, HubError: as `FileReader.read_into`.
    """
    if isinstance(source, TensorData):
        return source.data
    held = bytearray(source.nbytes)
    with FileReader() as reader:
        reader.read_into(source.file, source.start, memoryview(held))
    return memoryview(held)


def _stamp_of(stat: os.stat_result) -> Stamp:
    return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
