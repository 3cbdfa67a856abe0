"""Random numbers by position: the same on every device, whatever is drawn before or beside them."""

from __future__ import annotations

import torch

_PIECE = 1 << 19  # elements drawn in one go on a CPU: a few arrays stay in the cache


def uniform(position: torch.Tensor, key: int) -> torch.Tensor:
    """Numbers in [0, 1) by splitmix64 (Steele, Lea & Flood 2014), counter-based; float64.

    Args:
        position: int64, any shape.
        key: 64-bit key of the stream, as a signed integer.
    """
    z = position * -7046029254386353131 + key  # 0x9E3779B97F4A7C15, wrapping
    z = (z ^ _shift(z, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    z = (z ^ _shift(z, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return _shift(z ^ _shift(z, 31), 11).double() * 2.0**-53


def scale_by_noise(matrix: torch.Tensor, seed: int) -> None:
    """Multiply every element by a number of its own, uniform in [-1/2, 1/2], in place.

    The numbers are 32-bit hashes of the element's position: Wellons' "lowbias32", with a word of
    the seed's stream before each of its two rounds.

    Args:
        matrix: (m, n) float32, contiguous.
        seed: at least 0.
    """
    first, second = (int(uniform(torch.tensor(i), seed) * 2.0**32) for i in range(2))
    cols = matrix.shape[1]
    height = len(matrix) if matrix.is_cuda else max(1, _PIECE // max(1, cols))
    steps = torch.arange(cols, dtype=torch.int32, device=matrix.device)
    for row in range(0, len(matrix), height):
        part = matrix[row : row + height]
        starts = torch.arange(row, row + len(part), device=matrix.device).mul_(cols)
        z = starts.int()[:, None] + steps  # wraps, as everything here
        work = torch.empty_like(z)
        z.bitwise_xor_(_signed(first))
        _mix(z, 16, 0x7FEB352D, work)
        z.bitwise_xor_(_signed(second))
        _mix(z, 15, 0x846CA68B, work)
        z.bitwise_xor_(_shift(z, 16, out=work))
        part.mul_(z).mul_(2.0**-32)


def _mix(z: torch.Tensor, shift: int, factor: int, work: torch.Tensor) -> None:
    z.bitwise_xor_(_shift(z, shift, out=work)).mul_(_signed(factor))


def _shift(z: torch.Tensor, count: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """Logical shift to the right; torch's own keeps the sign."""
    mask = (1 << (8 * z.element_size() - count)) - 1
    return torch.bitwise_right_shift(z, count, out=out).bitwise_and_(mask)


def _signed(word: int) -> int:
    """The int32 with the bits of a 32-bit number."""
    return word - ((word & 0x80000000) << 1)
