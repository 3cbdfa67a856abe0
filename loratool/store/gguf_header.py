"""The header of a new GGUF file."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

from loratool.dtypes import tensor_bytes
from loratool.errors import BadFileError
from loratool.store.gguf import ALIGNMENT, KINDS, MAGIC

_VERSION = 3
_U32, _F32, _TEXT = 4, 6, 8
_NUMBERS = {name: number for number, (name, _, _) in KINDS.items()}


def build_gguf_header(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]],
    metadata: Mapping[str, str],
    numbers: Mapping[str, float],
) -> tuple[bytes, tuple[int, ...], int]:
    """The bytes before the tensors, where each tensor starts, and the size of the file.

    Equal arguments give equal bytes.  Between tensors lie zeros, up to the next multiple of 32.

    Args:
        tensors: (name, dtype, shape), the outermost axis first.
        metadata: texts, in the given order.
        numbers: what follows them: an int as 32 bits without sign, a float as float32.

    Raises:
        BadFileError: LT-306, a name occurs twice; LT-310, no type of GGUF.
    """
    if len({name for name, _, _ in tensors}) < len(tensors):
        raise BadFileError("LT-306", "duplicate or reserved tensor name")
    head = [MAGIC, struct.pack("<IQQ", _VERSION, len(tensors), len(metadata) + len(numbers))]
    head += [_text(key) + struct.pack("<I", _TEXT) + _text(value)
             for key, value in metadata.items()]  # fmt: skip
    for key, value in numbers.items():
        is_int = isinstance(value, int)
        head.append(_text(key) + struct.pack("<II" if is_int else "<If",
                                             _U32 if is_int else _F32, value))  # fmt: skip
    offsets, end = [], 0
    for name, dtype, shape in tensors:
        if dtype not in _NUMBERS:
            raise BadFileError("LT-310", "tensor of a type that GGUF has not", key=name, got=dtype)
        head.append(_text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1]))
        head.append(struct.pack("<IQ", _NUMBERS[dtype], end))
        offsets.append(end)
        end += aligned(tensor_bytes(dtype, shape))
    header = b"".join(head)
    header += bytes(aligned(len(header)) - len(header))
    return header, tuple(len(header) + offset for offset in offsets), len(header) + end


def aligned(size: int) -> int:
    """The next multiple of 32: what a tensor of so many bytes takes, zeros behind it included."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def _text(word: str) -> bytes:
    data = word.encode()
    return struct.pack("<Q", len(data)) + data
