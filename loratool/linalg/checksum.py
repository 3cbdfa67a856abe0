"""A checksum of a tensor's bits that blocks may add to in any order, on any device."""

from __future__ import annotations

import torch

_MULTIPLIER = -0x61C8864680B583EB  # 2⁶⁴ ÷ golden ratio, as a signed number
_MASK = (1 << 64) - 1


def block_checksum(bits: torch.Tensor, start: int) -> int:
    """Σ bits_i · w_i mod 2⁶⁴ over a run of elements; runs add up to the tensor's checksum.

    w_i is odd and mixes the position i, so every change of one element shows, and others go
    unseen by a chance of 2⁻⁶⁴ or so.  No protection against malice.

    Args:
        bits: any shape, a signed integer type: consecutive elements.
        start: position of the first.
    """
    flat = bits.flatten().to(torch.int64)
    weight = torch.arange(start + 1, start + 1 + len(flat), device=bits.device)
    weight.mul_(_MULTIPLIER)
    weight.bitwise_xor_(weight >> 29).bitwise_or_(1)
    return int(weight.mul_(flat).sum()) & _MASK


def add_checksums(*parts: int) -> int:
    """The checksum of all runs together."""
    return sum(parts) & _MASK
