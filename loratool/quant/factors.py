"""What codecs with a factor for each block share."""

from __future__ import annotations

import torch

from loratool.adapter import CodedRef
from loratool.quant.base import Reader, block_rows
from loratool.quant.reading import TYPES, load


def load_scales(ref: CodedRef, reader: Reader) -> torch.Tensor:
    """Factors (rows of blocks, columns of blocks), float32, those of a stack below each other."""
    assert ref.scales is not None
    cols = ref.shape[-1] if ref.shape else 1
    return load(ref.scales, reader).float().view(-1, -(-cols // ref.block[1]))


def store_scales(scales: torch.Tensor, dtype: str) -> torch.Tensor:
    """Factors in the type that they are stored in."""
    return scales.to(TYPES[dtype])


def scale(values: torch.Tensor, scales: torch.Tensor, ref: CodedRef, first: int) -> None:
    """Multiply flat float32 numbers of a weight by their factors, in place.

    Args:
        values: (n,), from element ``first`` of the weight on.
        scales: of `load_scales`.
        ref: the weight.
        first: position of the first element.
    """
    cols = ref.shape[-1] if ref.shape else 1
    width = min(ref.block[1], cols)
    if first % cols or len(values) % cols:  # part of a row
        at = torch.arange(first, first + len(values))
        values.mul_(scales[block_rows(at // cols, ref), at % cols // width])
        return
    rows = values.view(-1, cols)
    factors = scales[block_rows(torch.arange(first // cols, first // cols + len(rows)), ref)]
    whole = cols // width * width
    torch.unflatten(rows[:, :whole], 1, (-1, width)).mul_(factors[:, : whole // width, None])
    if whole < cols:
        rows[:, whole:].mul_(factors[:, -1:])


def fit(
    peaks: torch.Tensor, scales: torch.Tensor, held: torch.Tensor, wanted: torch.Tensor, dtype: str
) -> torch.Tensor:
    """Factors under which the largest numbers of all blocks can be coded.

    A factor stays where it holds its block: another one would round every number in it anew.

    Args:
        peaks: largest size in each block, float64, shape of ``scales``.
        scales: the old factors, float32.
        held: the largest number under each of them, float64.
        wanted: the least factor for each block, float64.
        dtype: that factors are stored in.

    Returns:
        float32, every one representable in ``dtype``.
    """
    return torch.where(peaks <= held, scales.double(), rounded_up(wanted, dtype)).float()


def rounded_up(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """The smallest numbers of a type that are not below; float64."""
    if dtype == "F8_E8M0":
        return torch.exp2(torch.log2(values.clamp_min(2.0**-127)).ceil())
    target = TYPES[dtype]
    near = values.to(target)
    above = torch.nextafter(near, torch.full_like(near, torch.inf))
    return torch.where(near.double() < values, above, near).double()


def to_odd(values: torch.Tensor) -> torch.Tensor:
    """float64 as float32, cut with the last bit set where anything is cut: no second rounding."""
    cut = values.float()
    bits = cut.view(torch.int32)
    bits -= (cut.double().abs() > values.abs()).int()
    bits |= (cut.double() != values).int()
    return cut
