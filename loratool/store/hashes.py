"""Hashes of tensors as they would lie in a file of the safetensors library."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence

from loratool.adapter import Source, TensorData
from loratool.store.header import build_header
from loratool.store.reader import FileReader

LIBRARY_ORDER = (
    "BOOL", "F4", "F6_E2M3", "F6_E3M2", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "I16", "U16",
    "F16", "BF16", "I32", "U32", "F32", "C64", "F64", "I64", "U64",
)  # fmt: skip
"""Element types as the library orders them: tensors of the last come first, then by name."""
_WINDOW = (1 << 20, (1 << 20) + (1 << 16))
"""Bytes of a file that the old short hash of web UIs is made of."""
_PIECE = 8 << 20


def hash_tensors(
    tensors: Sequence[tuple[str, Source]], metadata: Mapping[str, str], *, as_laid: bool = False
) -> tuple[str, str]:
    """Two sha256, in hexadecimal: of all tensors, and of 64 KiB of the file from 1 MiB on.

    Args:
        tensors: name and bytes, in any order.
        metadata: of the file that the second one is of.
        as_laid: they lie in the given order.
    """
    place = {dtype: number for number, dtype in enumerate(LIBRARY_ORDER)}
    ordered = list(tensors)
    if not as_laid:
        ordered.sort(key=lambda t: (-place.get(t[1].dtype, -1), t[0]))
    header, _ = build_header([(n, s.dtype, s.shape) for n, s in ordered], metadata)
    whole, window = hashlib.sha256(), hashlib.sha256(header[slice(*_WINDOW)])
    at = len(header)
    with FileReader() as reader:
        for _, source in ordered:
            for piece in _pieces(source, reader):
                whole.update(piece)
                first, last = (max(edge - at, 0) for edge in _WINDOW)
                window.update(piece[first:last])
                at += len(piece)
    return whole.hexdigest(), window.hexdigest()


def _pieces(source: Source, reader: FileReader) -> Iterator[memoryview]:
    if isinstance(source, TensorData):
        yield memoryview(source.data).cast("B")
        return
    buffer = memoryview(bytearray(min(_PIECE, source.nbytes)))
    for done in range(0, source.nbytes, _PIECE):
        piece = buffer[: min(_PIECE, source.nbytes - done)]
        reader.read_into(source, done, piece)
        yield piece
