"""One weight file under construction: header first, then blocks at their offsets."""

from __future__ import annotations

import errno
import os
import threading
from io import FileIO
from pathlib import Path

from loratool.store.checksum import Piece, PieceSums, sum_whole
from loratool.store.disk import (
    create_new,
    disk_error,
    lies_in_memory,
    progress,
    refusals_as,
)
from loratool.store.reader import plain_io

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PAGE = 4096
_DIRECT_MIN = 1 << 16  # smaller pieces are not worth a direct write


class BlockWriter:
    """Blocks at their offsets of one file, from any thread.

    On Linux the aligned middle of each piece goes past the page cache (O_DIRECT), which halves
    the traffic; the ends of a piece, and everything on file systems without O_DIRECT, go through
    it.  A page is written either way whole or not at all by the direct path, so both may mix.

    Attributes:
        path: the file.
        sums: checksums of what was put.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sums = PieceSums()
        self._plain = plain_io()
        self._seeking = (
            threading.Lock()
        )  # the place of the next write is the file's, not a thread's
        self._fd = self._direct = -1
        self._direct_works = True

    def _open_direct(self) -> int:
        try:
            return -1 if self._plain else os.open(self.path, os.O_WRONLY | os.O_DIRECT)
        except (OSError, AttributeError):
            return -1

    def put(self, offset: int, data: memoryview, aligned: bool = False) -> None:
        """Write ``data`` at ``offset``.

        Args:
            offset: position in the file.
            data: bytes.
            aligned: the address of ``data`` and ``offset`` agree modulo the page size, so that
                the middle may be written directly.
        """
        self.sums.add(offset, data)
        try:
            if aligned and self._direct >= 0 and self._direct_works and len(data) >= _DIRECT_MIN:
                head = -offset % PAGE
                tail = (offset + len(data)) % PAGE
                if self._write_direct(data[head : len(data) - tail], offset + head):
                    self._write_all(data[:head], offset)
                    self._write_all(data[len(data) - tail :], offset + len(data) - tail)
                    return
            self._write_all(data, offset)
        except OSError as error:
            raise disk_error("cannot write", self.path, error) from error

    def _write_direct(self, data: memoryview, offset: int) -> bool:
        done = 0
        while done < len(data):
            try:
                wrote = os.pwrite(self._direct, data[done:], offset + done)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._direct_works = False  # the file system took O_DIRECT and then did not mean it
                return False
            done += progress(wrote)
            if wrote % PAGE and done < len(data):
                self._write_all(data[done:], offset + done)
                return True
        return True

    def _write_all(self, data: memoryview, offset: int) -> None:
        done = 0
        while done < len(data):
            if not self._plain:
                done += progress(os.pwrite(self._fd, data[done:], offset + done))
                continue
            with self._seeking:
                os.lseek(self._fd, offset + done, os.SEEK_SET)
                done += progress(os.write(self._fd, data[done:]))

    def close(self) -> None:
        """Close without syncing (after an error)."""
        for fd in (self._fd, self._direct):
            if fd >= 0:
                os.close(fd)
        self._fd = self._direct = -1


class ShardWriter(BlockWriter):
    """One weight file: header first, then blocks at their offsets.

    Args:
        path: file to create.
        header: length prefix and header JSON.
        size: final size in bytes.
    """

    def __init__(self, path: Path, header: bytes, size: int) -> None:
        super().__init__(path)
        self.size = size
        try:
            self._fd = create_new(path, os.O_RDWR)
            self._direct = self._open_direct()
            self._reserve()
            self.put(0, memoryview(header))
        except OSError as error:
            self.close()
            raise disk_error("cannot create", path, error) from error

    def _reserve(self) -> None:
        """Take the room on the disk; in memory that would fill it with zeros first."""
        if hasattr(os, "posix_fallocate") and self.size and not lies_in_memory(self.path):
            try:
                os.posix_fallocate(self._fd, 0, self.size)
                return
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
        os.ftruncate(self._fd, self.size)

    def data_sum(self) -> tuple[int, int]:
        """(size, crc32) of everything after the header."""
        return sum_whole(self.sums.pieces()[1:])

    def rewrite_header(self, header: bytes) -> None:
        """Write the header again, now that it can say what the file holds; of the same length."""
        self.sums.drop_first()
        self.put(0, memoryview(header))

    def pieces(self) -> list[Piece]:
        """Checksums of what was put, in file order."""
        return self.sums.pieces()

    def finish(self) -> None:
        """Sync and close."""
        try:
            with refusals_as("cannot sync", self.path):
                os.fsync(self._fd)
        finally:
            self.close()


class FilePart(BlockWriter):
    """One tensor's place in a file that another process has created; can be pickled.

    Args:
        path: the file.
        start: where the tensor begins in it.
    """

    def __init__(self, path: Path, start: int) -> None:
        super().__init__(path)
        self.start = start

    def __reduce__(self) -> tuple[type[FilePart], tuple[Path, int]]:
        return FilePart, (self.path, self.start)

    def put(self, offset: int, data: memoryview, aligned: bool = False) -> None:
        """Write at an absolute offset of the file, see `BlockWriter.put`."""
        if self._fd < 0:
            with refusals_as("cannot write", self.path):
                self._fd = os.open(self.path, os.O_RDWR | getattr(os, "O_BINARY", 0))
            self._direct = self._open_direct()
        super().put(offset, data, aligned)

    def sync(self) -> None:
        """See what was put on the disk: the machine that has created the file cannot."""
        if self._fd >= 0:
            with refusals_as("cannot sync", self.path):
                os.fsync(self._fd)

    def pieces(self) -> list[Piece]:
        """Checksums of what was put."""
        return self.sums.pieces()


def clone_file(source: FileIO, target: Path) -> bool:
    """Share the blocks of ``source`` (reflink) where the file system can; False if it cannot."""
    if fcntl is None or plain_io():
        return False
    ficlone = 0x40049409  # <linux/fs.h>
    fd = create_new(target)
    try:
        fcntl.ioctl(fd, ficlone, source.fileno())
        os.fsync(fd)
    except OSError:
        target.unlink()
        return False
    finally:
        os.close(fd)
    return True
