"""A crc32 of whole tensors, wherever their files lie."""

from __future__ import annotations

from collections.abc import Mapping

from loratool.adapter import TensorRef
from loratool.store.checksum import crc32
from loratool.store.pool import waiting_threads
from loratool.store.reader import FileReader

_READERS = 4  # one thread's crc32 is no faster than the disk
_PIECE = 4 << 20


def sum_tensors(refs: Mapping[str, TensorRef]) -> dict[str, str]:
    """Name -> crc32 of a tensor's bytes as they are stored, eight hexadecimal digits.

    Args:
        refs: of any dtype and shape; read in pieces, several tensors at a time.

    Raises:
        BadFileError, DiskError, HubError: as `FileReader.read_into`.
    """
    with FileReader() as reader, waiting_threads(_READERS) as pool:
        sums = pool.map(lambda ref: _sum(ref, reader), refs.values())
        return {name: f"{crc:08x}" for name, crc in zip(refs, sums, strict=True)}


def _sum(ref: TensorRef, reader: FileReader) -> int:
    crc, held = 0, memoryview(bytearray(min(_PIECE, ref.nbytes)))
    for start in range(0, ref.nbytes, _PIECE):
        piece = held[: ref.nbytes - start]
        reader.read_into(ref, start, piece)
        crc = crc32(piece, crc)
    return crc
