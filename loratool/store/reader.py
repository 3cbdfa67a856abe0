"""Bytes of input files, by position, into buffers that the caller owns.

No mmap: a source that shrinks while it is read must be an error, not SIGBUS.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from io import FileIO
from itertools import groupby
from pathlib import Path
from typing import Any

from loratool.adapter import ArrangedRef, CodedRef, JoinedRef, Source, Stamp, TensorData, TensorRef
from loratool.dtypes import DTYPES
from loratool.errors import BadFileError, DiskError, UnsafeContentError
from loratool.frozen import Struct, replace
from loratool.location import Location, RemoteFile, changed
from loratool.quant import codec_of
from loratool.store.axes import arrange
from loratool.store.contained import open_again
from loratool.store.remote_spans import Range, ReadAhead, by_file
from loratool.store.stamps import check_stamp, stamp_from, stamp_in, stamp_of

__all__ = ["FileReader", "Stamp", "are_of_one_file", "have_same_bytes", "plain_io", "stamp_of"]

_PIECE = 1 << 22  # bytes compared at a time
_FIRST_PIECE = 1 << 16
_GAP = 1 << 12  # bytes between small tensors that are read along with them


def plain_io() -> bool:
    """True where only seek/read/write may be used (other systems, or LORATOOL_PLAIN_IO=1)."""
    return os.environ.get("LORATOOL_PLAIN_IO") == "1" or not hasattr(os, "preadv")


def most_open_files() -> int:
    """How many input files stay open: a quarter of what the system allows (``ulimit -n``)."""
    try:
        import resource

        allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    except ImportError:  # Windows: the C library's own limit
        allowed = 512
    return max(8, min(allowed // 4, 512)) if allowed >= 0 else 512  # -1: no limit


class _Open(Struct):
    """An open file and how many threads are reading it."""

    file: FileIO
    users: int = 0


class FileReader:
    """Positioned reads from any number of files, safe for several threads.

    Files are opened on first use; of many those used last stay open.  Each is held to what it
    was when its header was read.

    Args:
        stamps: files that must not change even if they are not read.
    """

    def __init__(self, stamps: Mapping[Location, Stamp] | None = None) -> None:
        self._stamps: dict[Location, Stamp] = dict(stamps or {})
        self._files: dict[Path, _Open] = {}  # in the order of their last use
        self._ahead = ReadAhead()
        self._most = most_open_files()
        self._lock = threading.Lock()
        self._plain = plain_io()

    def __enter__(self) -> FileReader:
        return self

    def __reduce__(self) -> tuple[type[FileReader], tuple[dict[Location, Stamp]]]:
        return type(self), (dict(self._stamps),)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            for entry in self._files.values():
                entry.file.close()
            self._files.clear()
        self._ahead.clear()

    def read_into(self, ref: TensorRef, start: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with bytes of a tensor.

        Args:
            ref: the tensor.
            start: offset of the first byte in the tensor.
            buffer: as many bytes as are wanted.

        Raises:
            BadFileError: the file ends before the buffer is full, or is not what it was.
            DiskError: the system refuses to read.
            HubError: the file is remote, and the bytes do not come.
        """
        if isinstance(ref, CodedRef):
            codec_of(ref.codec).coder.decode(ref, self, start, buffer)
            return
        if isinstance(ref, JoinedRef):
            done = 0
            for piece, first, count in ref.cut(start, start + len(buffer)):
                self.read_into(piece, first, buffer[done : done + count])
                done += count
            return
        if isinstance(ref, ArrangedRef):
            whole = memoryview(bytearray(ref.nbytes))
            self._read_plain(ref, 0, whole)
            size = DTYPES[ref.dtype].bits // 8
            buffer[:] = memoryview(arrange(whole, ref.laid, ref.axes, size))[
                start : start + len(buffer)
            ]
            return
        self._read_plain(ref, start, buffer)

    def _read_plain(self, ref: TensorRef, start: int, buffer: memoryview) -> None:
        """Bytes as the file has them."""
        stored = max(0, min(len(buffer), ref.stored_bytes - start)) if ref.zeros else len(buffer)
        if stored < len(buffer):
            buffer[stored:] = bytes(len(buffer) - stored)
            buffer = buffer[:stored]
        offset = ref.start + start
        if isinstance(ref.file, RemoteFile):
            if ref.file not in self._stamps:
                self._stamps[ref.file] = ref.file.stamp
            buffer[:] = self._ahead.read(ref.file, offset, len(buffer))
            return
        done = 0
        with self.lend(ref) as file:
            while done < len(buffer):
                try:
                    got = self._read(file, offset + done, buffer[done:])
                except OSError as error:
                    raise DiskError(
                        "LT-601", "cannot read", file=ref.file, got=error.strerror
                    ) from error
                if got == 0:
                    raise BadFileError(
                        "LT-331", "file ended while it was read", file=ref.file,
                        expected=f"{len(buffer)} bytes at {offset}", got=f"{done} bytes",
                        hint="the file changed during the run: do not write to inputs",
                    )  # fmt: skip
                done += got

    def read_small(self, refs: Iterable[TensorRef]) -> list[bytes]:
        """The bytes of many small tensors, neighbours in one piece.

        Raises:
            BadFileError: of `read_into`.
        """
        refs = list(refs)
        self.expect((r.file, r.start, r.nbytes) for r in refs if isinstance(r.file, RemoteFile))
        found: list[bytes] = []
        for file, group in groupby(refs, key=lambda ref: ref.file):
            members = list(group)
            if isinstance(file, RemoteFile):
                found += map(self._read_whole, members)
            else:
                found += self.read_spans(members[0], [(r.start, r.nbytes) for r in members])
        return found

    def read_spans(self, ref: TensorRef, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """Bytes of the file here that a tensor is in.

        Args:
            ref: any tensor of the file.
            spans: (absolute offset, length), neighbours side by side.

        Raises:
            BadFileError: of `read_into`.
        """
        pieces: list[tuple[int, int]] = []
        for start, length in spans:
            if pieces and 0 <= start - sum(pieces[-1]) <= _GAP:
                pieces[-1] = (pieces[-1][0], start + length - pieces[-1][0])
            else:
                pieces.append((start, length))
        with self.lend(ref) as file:
            number = -1 if self._plain else file.fileno()
            read = [os.pread(number, n, at) if number >= 0 else b"" for at, n in pieces]
        if sum(map(len, read)) < sum(n for _, n in pieces):
            read = [self._read_whole(replace(ref, start=at, nbytes=n)) for at, n in pieces]
        if len(pieces) == len(spans):
            return read
        found, place = [], 0
        for start, length in spans:
            while start + length > sum(pieces[place]):
                place += 1
            at = start - pieces[place][0]
            found.append(read[place][at : at + length])
        return found

    def _read_whole(self, ref: TensorRef) -> bytes:
        raw = bytearray(ref.nbytes)
        self.read_into(ref, 0, memoryview(raw))
        return bytes(raw)

    @contextmanager
    def lend(self, ref: TensorRef) -> Iterator[FileIO]:
        """The file of a tensor, open as long as the block runs.

        Raises:
            BadFileError: LT-332, it is not what it was.
            DiskError: the system refuses to open it.
        """
        with self._lock:
            if ref.path not in self._files:
                self._files[ref.path] = _Open(self._open(ref))
            if ref.stamp and self._here(ref.path, ref.stamp) != self._stamps[ref.path]:
                raise changed(ref.path)
            entry = self._files[ref.path] = self._files.pop(ref.path)  # now the last one
            entry.users += 1
            self._close_some()
        try:
            yield entry.file
        finally:
            with self._lock:
                entry.users -= 1

    def _open(self, ref: TensorRef) -> FileIO:
        path = ref.path
        held = self._here(path, ref.stamp) if ref.stamp else self._stamps.get(path)
        if held is not None:  # what lies there now is not even opened
            check_stamp(path, held)
        try:
            file = open_again(path)
        except (BadFileError, UnsafeContentError) as error:
            raise changed(path) from error
        stamp = stamp_from(os.fstat(file.fileno()))
        if stamp != self._stamps.setdefault(path, held or stamp):
            file.close()
            raise changed(path)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return file

    def _here(self, path: Path, stamp: Stamp) -> Stamp:
        """A stamp of a file as this machine takes it."""
        return stamp

    def _close_some(self) -> None:
        """Close what was not used for longest, but nothing that a thread is reading."""
        excess = len(self._files) - self._most
        if excess > 0:
            unused = [path for path, entry in self._files.items() if not entry.users]
            for path in unused[:excess]:
                self._files.pop(path).file.close()

    def _read(self, file: FileIO, offset: int, buffer: memoryview) -> int:
        if not self._plain:
            return os.preadv(file.fileno(), [buffer], offset)
        with self._lock:
            file.seek(offset)
            return file.readinto(buffer) or 0

    def expect(self, ranges: Iterable[Range]) -> None:
        """Say what will be read: of remote files neighbours then come in one request."""
        for file, parts in by_file(ranges).items():
            self._ahead.expect(file, parts)

    def hold(self, refs: Iterable[TensorRef]) -> None:
        """Hold files to what they were when their headers were read, whoever reads them.

        Raises:
            BadFileError: LT-332, two tensors of a file saw it differently.
        """
        with self._lock:
            for file, stamp in map(stamp_in, refs):
                held = stamp and self._stamps.setdefault(file, stamp)
                if held != stamp:
                    raise changed(file)

    def check_unchanged(self) -> None:
        """Compare every file that was read, or given a stamp, with what it was.

        Raises:
            BadFileError: LT-332, its stamp is another.
        """
        with self._lock:
            held = dict(self._stamps)
        for path, stamp in held.items():
            check_stamp(path, stamp)


def are_of_one_file(refs: Sequence[TensorRef]) -> bool:
    """True for the same bytes of remote files whose content is known to be one: not to be read."""
    places = {_place_in_content(ref) for ref in refs}
    return len(places) == 1 and None not in places


def _place_in_content(ref: TensorRef) -> tuple[Any, ...] | None:
    """Which bytes of which content a tensor is, and in what order; None where that is not known."""
    file = ref.file
    if not isinstance(file, RemoteFile) or not file.content or isinstance(ref, JoinedRef):
        return None
    order = (ref.laid, ref.axes) if isinstance(ref, ArrangedRef) else ()
    return file.content, ref.start, order


def have_same_bytes(sources: Sequence[Source], reader: FileReader | None = None) -> bool:
    """True if tensors agree in type, shape and every bit; read piece by piece.

    Args:
        sources: tensors.
        reader: who reads; None = one for these alone.
    """
    first = sources[0]
    if any((s.dtype, s.shape) != (first.dtype, first.shape) for s in sources):
        return False
    refs = [s for s in sources if isinstance(s, TensorRef)]
    if len(refs) < len(sources):
        return all(isinstance(s, TensorData) and s == first for s in sources)
    if are_of_one_file(refs):
        return True
    with nullcontext(reader) if reader else FileReader() as reader:
        # What differs mostly does so at once, and may have to come from far.
        ends = [min(_FIRST_PIECE, first.nbytes), *range(_PIECE, first.nbytes, _PIECE), first.nbytes]
        for start, end in zip([0, *ends], ends, strict=False):
            pieces = []
            for ref in refs:
                piece = bytearray(end - start)
                reader.read_into(ref, start, memoryview(piece))
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
        reader.read_into(source, 0, memoryview(held))
    return memoryview(held)
