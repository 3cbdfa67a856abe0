"""Sums of squares in float64."""

from __future__ import annotations

import torch

_PIECE = {"cpu": 1 << 16, "cuda": 1 << 24}  # elements widened at a time: a core's cache, a launch


def sum_of_squares(values: torch.Tensor) -> float:
    """Σ x², exact products, summed in float64.

    Args:
        values: any shape and float type, any device.

    Returns:
        inf or NaN where an element is, or where the sum exceeds float64.
    """
    return float(squared_sum(values))


def squared_sum(values: torch.Tensor) -> torch.Tensor:
    """`sum_of_squares` as a float64 number on the device: a GPU goes on with its work meanwhile.

    In pieces that stay in the cache: widening a whole tensor, or ``vector_norm`` with a dtype,
    takes ten times as long on a CPU.
    """
    if values.device.type == "cuda" and values.numel() <= _PIECE["cuda"]:
        norm: torch.Tensor = torch.linalg.vector_norm(values, dtype=torch.float64)
        return norm.square()
    flat = (values if values.is_contiguous() else values.mT).flatten()
    piece = _PIECE[flat.device.type]
    scratch = flat.new_empty(min(piece, flat.numel()), dtype=torch.float64)
    total = flat.new_zeros((), dtype=torch.float64)
    for start in range(0, flat.numel(), piece):
        part = flat[start : start + piece]
        wide = scratch[: part.numel()].copy_(part)
        total += torch.dot(wide, wide)
    return total


def squared_sums(stack: torch.Tensor) -> torch.Tensor:
    """`squared_sum` of each of a stack (b, m, n): (b,) float64 on the device."""
    if stack.device.type != "cuda":
        return torch.stack([squared_sum(one) for one in stack])
    count, rows, cols = stack.shape
    height = max(1, _PIECE["cuda"] // max(1, count * cols))
    parts = torch.split(stack, height, 1) if rows else [stack]
    norms = [torch.linalg.vector_norm(part, dim=(1, 2), dtype=torch.float64) for part in parts]
    return torch.stack(norms).square().sum(0)
