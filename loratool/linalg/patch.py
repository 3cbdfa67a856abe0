"""Sparse patches: which elements of a tensor differ from a prediction, and by how many steps.

A patch counts in bit patterns taken as integers, so that neighbours differ by 1 and every value,
NaN payloads too, comes back bit for bit.

    sparse  b"S", count, zlib(gaps as bytes), zlib(byte planes of zigzag differences)
    dense   b"D", zlib(byte planes of zigzag differences of all elements)

Gaps between patched positions are bytes; 255 means "255, and it goes on".

The patch of a large tensor is a pack of pages, one per block: their number, their sizes, and the
pages one after another (an empty page patches nothing).
"""

from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
Bits = npt.NDArray[np.signedinteger]

_DENSE_SHARE = 0.3  # above, a position costs more than the zero differences it leaves out
_HEAD = struct.Struct("<cQQQ")  # form, elements patched, bytes of the gaps, bytes of the planes
_ESCAPE = 255


def find_differences(predicted: Bits, wanted: Bits) -> tuple[Indices, Bits]:
    """Positions where two runs of bit patterns differ, and wanted - predicted there (wrapping).

    Args:
        predicted: (n,) signed integers.
        wanted: (n,) same type.
    """
    at = np.flatnonzero(predicted != wanted)
    with np.errstate(over="ignore"):
        return at, wanted[at] - predicted[at]


def encode_patch(at: Indices, diff: Bits, numel: int) -> bytes:
    """Pack differences.

    Args:
        at: (k,) ascending positions.
        diff: (k,) what to add there.
        numel: elements of the tensor.
    """
    if len(at) > _DENSE_SHARE * numel:
        whole = np.zeros(numel, diff.dtype)
        whole[at] = diff
        planes = zlib.compress(_planes(whole), 6)
        return _HEAD.pack(b"D", len(at), 0, len(planes)) + planes
    gaps = zlib.compress(_gap_bytes(at), 6)
    planes = zlib.compress(_planes(diff), 6)
    return _HEAD.pack(b"S", len(at), len(gaps), len(planes)) + gaps + planes


def decode_patch(
    data: bytes | memoryview, numel: int, dtype: npt.DTypeLike
) -> tuple[Indices, Bits]:
    """Positions and differences of a patch.

    Args:
        data: what `encode_patch` made.
        numel: elements of the tensor.
        dtype: signed integer type of its elements.

    Raises:
        ValueError: damaged, or for a tensor of another size or type.
    """
    kind = np.dtype(dtype)
    if len(data) < _HEAD.size:
        raise ValueError("patch is too short")
    form, count, gap_bytes, plane_bytes = _HEAD.unpack_from(data)
    if len(data) != _HEAD.size + gap_bytes + plane_bytes or count > numel:
        raise ValueError("patch has another length than it says")
    stored = numel if form == b"D" else count
    gaps = bytes(data[_HEAD.size : _HEAD.size + gap_bytes])
    # every 255 is 255 elements further on: what a sound patch can unpack to is known
    packed = _inflate(gaps, count + numel // _ESCAPE + 1) if form == b"S" else b""
    diff = _from_planes(
        _inflate(bytes(data[_HEAD.size + gap_bytes :]), stored * kind.itemsize), stored, kind
    )
    if form == b"D":
        at = np.flatnonzero(diff)
        return at, diff[at]
    at = _from_gap_bytes(packed)
    if len(at) != count or (count and at[-1] >= numel):
        raise ValueError("patch does not fit the tensor")
    return at, diff


def apply_patch(predicted: Bits, at: Indices, diff: Bits) -> None:
    """Turn predictions into what was wanted, in place."""
    with np.errstate(over="ignore"):
        predicted[at] += diff


def pack_index(pages: Sequence[bytes]) -> bytes:
    """What comes before the pages in a pack: their number and sizes."""
    return np.array([len(pages), *map(len, pages)], np.uint64).tobytes()


def index_bytes(count: int) -> int:
    """Size of the index of so many pages."""
    return 8 * (count + 1)


def unpack_index(index: bytes | memoryview, total: int) -> list[int]:
    """Where the pages of a pack lie: the first byte of each, and one past the last one's.

    Args:
        index: as many bytes as the index must have.
        total: bytes of the whole pack.

    Raises:
        ValueError: damaged, or another number of pages.
    """
    count, *sizes = np.frombuffer(index, np.uint64).tolist()
    if count != len(sizes):
        raise ValueError("patch has another number of pages")
    offsets = list(itertools.accumulate(sizes, initial=len(index)))
    if offsets[-1] != total:
        raise ValueError("patch has another length than it says")
    return offsets


def _gap_bytes(at: Indices) -> bytes:
    gaps = np.diff(at, prepend=-1) - 1
    escapes = gaps // _ESCAPE
    ends = np.cumsum(escapes + 1) - 1
    out = np.full(int(ends[-1]) + 1 if len(ends) else 0, _ESCAPE, np.uint8)
    out[ends] = (gaps % _ESCAPE).astype(np.uint8)
    return out.tobytes()


def _from_gap_bytes(raw: bytes) -> Indices:
    values = np.frombuffer(raw, np.uint8)
    ends = np.flatnonzero(values != _ESCAPE)
    return np.cumsum(values, dtype=np.int64)[ends] + np.arange(len(ends))


def _planes(diff: Bits) -> bytes:
    """Zigzag (0, -1, 1, -2 become 0, 1, 2, 3), then all lowest bytes, all second ones and so on."""
    bits = diff.dtype.itemsize * 8
    zigzag = (diff << 1) ^ (diff >> (bits - 1))
    return zigzag.view(np.uint8).reshape(len(diff), diff.dtype.itemsize).T.tobytes()


def _from_planes(raw: bytes, count: int, kind: np.dtype[Any]) -> Bits:
    planes = np.frombuffer(raw, np.uint8).reshape(kind.itemsize, count)
    unsigned = np.ascontiguousarray(planes.T).view(kind.str.replace("i", "u"))[:, 0]
    one = unsigned.dtype.type(1)
    found: Bits = ((unsigned >> one) ^ (~(unsigned & one) + one)).view(kind)
    return found


def _inflate(data: bytes, most: int) -> bytes:
    tool = zlib.decompressobj()
    try:
        out = tool.decompress(data, most + 1)
    except zlib.error as error:
        raise ValueError("patch is damaged") from error
    if len(out) > most or not tool.eof or tool.unused_data:
        raise ValueError("patch is damaged")
    return out
