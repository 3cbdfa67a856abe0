"""What decoders share: tensors of files in torch, packed integers, numbers made row by row."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from loratool.adapter import CodedRef, TensorRef
from loratool.quant.base import Reader

TYPES = {
    "U8": torch.uint8, "I8": torch.int8, "I32": torch.int32, "U32": torch.int32,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
    "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
"""safetensors name -> the torch type of the same bits (U32 as int32: shifts are masked)."""

STRIP = 1 << 18
"""Numbers made at a time: what is needed on the way stays in the cache."""

_TURNED_STRIP = 1 << 20
_WIDE_ROW = 16 << 10  # bytes: of wider rows parts are read, narrower ones whole
_PIECE = 4 << 20


def raw(ref: TensorRef, reader: Reader, start: int, stop: int) -> torch.Tensor:
    """Bytes of a tensor, uint8 (stop - start,)."""
    held = torch.empty(stop - start, dtype=torch.uint8)
    if stop > start:
        reader.read_into(ref, start, memoryview(held.numpy()))  # type: ignore[arg-type]
    return held


def load(ref: TensorRef, reader: Reader) -> torch.Tensor:
    """A whole tensor as it is stored."""
    return raw(ref, reader, 0, ref.nbytes).view(TYPES[ref.dtype]).view(ref.shape)


def load_rows(ref: TensorRef, reader: Reader, first: int, last: int) -> torch.Tensor:
    """Some rows of a tensor, all axes but the last one taken as rows."""
    size = ref.shape[-1] * TYPES[ref.dtype].itemsize
    held = raw(ref, reader, first * size, last * size).view(TYPES[ref.dtype])
    return held.view(last - first, ref.shape[-1])


def load_columns(
    ref: TensorRef, reader: Reader, rows: range, first: int, last: int
) -> torch.Tensor:
    """Columns ``first`` to ``last`` of some rows of a tensor, taken as in `load_rows`."""
    size, width = TYPES[ref.dtype].itemsize, ref.shape[-1]
    out = torch.empty(len(rows), last - first, dtype=TYPES[ref.dtype])
    if width * size > _WIDE_ROW:
        view = memoryview(out.view(torch.uint8).numpy()).cast("B")  # type: ignore[arg-type]
        each = (last - first) * size
        for i, row in enumerate(rows):
            reader.read_into(ref, (row * width + first) * size, view[i * each : (i + 1) * each])
        return out
    step = max(1, _PIECE // max(1, width * size))
    for at in range(rows.start, rows.stop, step):
        end = min(at + step, rows.stop)
        out[at - rows.start : end - rows.start] = load_rows(ref, reader, at, end)[:, first:last]
    return out


def fill(
    ref: CodedRef, start: int, buffer: memoryview, make: Callable[[int, int], torch.Tensor]
) -> None:
    """Fill a buffer with float32 numbers of a weight, some rows of it at a time.

    Args:
        ref: the weight.
        start: first byte, a multiple of 4.
        buffer: a multiple of 4 bytes long.
        make: (first row, last row) -> their numbers; of a turned weight rows of one matrix.
    """
    if not len(buffer):
        return
    cols = ref.shape[-1] if ref.shape else 1
    first, count = start // 4, len(buffer) // 4
    out = torch.frombuffer(buffer, dtype=torch.float32)
    for r0, r1 in _strips(ref, cols, first // cols, -(-(first + count) // cols)):
        made = make(r0, r1).reshape(-1)
        begin, end = max(first, r0 * cols), min(first + count, r1 * cols)
        out[begin - first : end - first] = made[begin - r0 * cols : end - r0 * cols]


def _strips(ref: CodedRef, cols: int, first: int, last: int) -> Iterator[tuple[int, int]]:
    height = ref.shape[-2] if ref.is_turned else last
    step = max(1, (_TURNED_STRIP if ref.is_turned else STRIP) // cols)
    while first < last:
        end = min(last, first + step, (first // height + 1) * height)
        yield first, end
        first = end


def unpack(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Integers that lie side by side in 32-bit words, the lowest bits first.

    Args:
        words: (…, n) int32.
        bits: of an integer; it may run from one word into the next.
        count: integers in a row.

    Returns:
        (…, count) int32.
    """
    if 32 % bits == 0:
        shifts = torch.arange(0, 32, bits, dtype=torch.int32)
        found = (words[..., None] >> shifts) & ((1 << bits) - 1)
        return found.flatten(-2)[..., :count]
    wide = torch.nn.functional.pad(words, (0, 1)).long() & 0xFFFFFFFF
    at = torch.arange(count) * bits
    word, shift = at // 32, at % 32
    found = (wide[..., word] >> shift) | (wide[..., word + 1] << (32 - shift))
    return (found & ((1 << bits) - 1)).int()


def nibbles(packed: torch.Tensor, *, high_first: bool = False) -> torch.Tensor:
    """Both halves of each byte, int64: (…, n) uint8 -> (…, 2·n)."""
    halves = (packed & 15, packed >> 4)
    return torch.stack(halves[::-1] if high_first else halves, -1).flatten(-2).long()
