"""Numbers as a base in 4 or 8 bits has them: quantised and read again in memory, block by block.

What trainers do when they load a base: bitsandbytes' nf4 (blocks of 64 of the flattened weight) and
int8 (rows, of float16), and the plain cast to 8-bit floats that trainers of image models have.
"""

from __future__ import annotations

import torch

from loratool.adapter import CodedRef
from loratool.quant.base import Reader
from loratool.quant.reading import TYPES, fill, raw

_SIZE = 64
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
_LARGEST = 127
_UNIT = 7.874015718698502e-3  # 1/127 in float32, as bitsandbytes has it


def decode(ref: CodedRef, reader: Reader, start: int, buffer: memoryview) -> None:
    """As `loratool.quant.base.Coder.decode`."""
    source, cols = ref.codes, ref.shape[-1]
    assert source is not None
    width = TYPES[source.dtype].itemsize
    as_left = {"nf4": as_nf4, "int8": as_int8, "fp8": as_fp8}[ref.fact("word")]

    def rows(first: int, last: int) -> torch.Tensor:
        begin = first * cols // _SIZE * _SIZE  # whole blocks, for whom they matter
        end = min(-(-last * cols // _SIZE) * _SIZE, source.numel)
        if ref.fact("word") == "int8":
            begin, end = first * cols, last * cols
        held = raw(source, reader, begin * width, end * width).view(TYPES[source.dtype])
        made = as_left(held, cols)
        return made[first * cols - begin : last * cols - begin]

    fill(ref, start, buffer, rows)


def as_nf4(values: torch.Tensor, cols: int) -> torch.Tensor:
    """Flat numbers, from where a block of 64 begins, as nf4 has them; float32."""
    flat = values.float()
    whole = len(flat) // _SIZE * _SIZE
    blocks = flat[:whole].view(-1, _SIZE)
    peaks = blocks.abs().amax(1, keepdim=True)
    made = _nearest(blocks * (1.0 / peaks.clamp_min(1e-38))) * peaks
    rest = flat[whole:]
    peak = rest.abs().amax().clamp_min(1e-38) if len(rest) else torch.ones(())
    return torch.cat([made.flatten(), _nearest(rest / peak) * peak])


def _nearest(shares: torch.Tensor) -> torch.Tensor:
    table = torch.tensor(_NF4)
    middles = (table[:-1] + table[1:]) / 2
    return table[torch.bucketize(shares.clamp(-1, 1), middles)]


def as_int8(values: torch.Tensor, cols: int) -> torch.Tensor:
    """Whole rows, flat, as int8 has them; float32."""
    rows = values.to(torch.float16).view(-1, cols)
    peaks = rows.abs().amax(1, keepdim=True).float()
    codes = torch.round(rows * (_LARGEST / peaks)).nan_to_num_(0.0)  # of a row of zeros
    return (codes.float() * peaks * _UNIT).flatten()


def as_fp8(values: torch.Tensor, cols: int) -> torch.Tensor:
    """Numbers cast to 8-bit floats of 4 exponent bits, no larger than the largest; float32."""
    target = torch.float8_e4m3fn
    largest = torch.finfo(target).max
    return values.float().clamp(-largest, largest).to(target).float()
