"""What a merge did to a tensor, by rows that stand for all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from loratool.engine import grid
from loratool.engine.buffers import bits_of
from loratool.engine.step_memory import MEASURED_WHOLE
from loratool.frozen import Frozen
from loratool.linalg import rounding
from loratool.linalg.one_call import OneCall
from loratool.linalg.rounding import INTEGERS

# In large tensors every eighth row of at most four blocks, and of every second one at most:
# measuring every element would cost more than the merge.
_STRIDE, _BLOCKS = 8, 4
# The prediction looks at about this many elements, in at most so many rows.
_ELEMENTS, _ROWS = 4096, 256


class Measured(Frozen):
    """Sums over the rows that were kept.

    Attributes:
        numel: elements in them.
        weight_square: ΣW².
        delta_square: ΣΔ².
        error_square: Σ(rounding error)².
        changed: elements whose bits differ from the base's.
        expected_loss: predicted Σ(rounding error)² / ΣΔ².
        expected_share: predicted share of elements that change.
    """

    numel: int = 0
    weight_square: float = 0.0
    delta_square: float = 0.0
    error_square: float = 0.0
    changed: int = 0
    expected_loss: float = 0.0
    expected_share: float = 0.0


class Sample:
    """Rows of W, of the sums before they were rounded, and of W', kept until the tensor is done.

    They are looked at together: with many threads each call of torch is a wait for the
    interpreter's lock.

    Args:
        view: of the tensor.
        elements: block size of the grid.

    Attributes:
        stride: of the tensor's rows, those that it divides are kept of a block.
    """

    def __init__(self, view: tuple[int, int], elements: int) -> None:
        self.stride = self._block_stride = 1
        if view[0] * view[1] > MEASURED_WHOLE:
            count = grid.count_blocks(view, elements)
            self.stride, self._block_stride = _STRIDE, max(2, -(-count // _BLOCKS))
        self._kept: dict[int, tuple[torch.Tensor, ...]] = {}

    def takes(self, index: int) -> bool:
        """Whether a block is one of those that stand for all."""
        return index % self._block_stride == 0

    def keep(
        self, index: int, first: int, base: torch.Tensor, acc: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Keep some rows of a block; blocks may come in any order and thread.

        Args:
            index: number of the block; nothing is kept of those that `takes` leaves out.
            first: number of its first row.
            base: (rows, cols), any float type.
            acc: the same shape, accumulator type, as the next one on the same device.
            out: the numbers that are written.
        """
        rows = slice(-first % self.stride, None, self.stride)
        if self.takes(index):
            contiguous = torch.contiguous_format
            self.put(
                index, *(one[rows].clone(memory_format=contiguous) for one in (base, acc, out))
            )

    def put(self, index: int, base: torch.Tensor, acc: torch.Tensor, out: torch.Tensor) -> None:
        """Keep the rows of a block that `takes` names: those that `stride` divides, none maybe."""
        if len(base):
            self._kept[index] = base, acc, out

    def measure(self, scale: float, target: torch.dtype | None, unit: float = 1.0) -> Measured:
        """Look at the rows, in their order; they are let go.

        Args:
            scale: of W; the change is measured against W so scaled.
            target: type that the sums are rounded to, for the prediction; None for none.
            unit: spacing of that type's number 1 in what is written: factors of codes.
        """
        if not self._kept:
            return Measured()
        kept = [self._kept.pop(i) for i in sorted(self._kept)]
        base, acc, out = (_together([rows[i] for rows in kept]) for i in range(3))
        kept.clear()
        bits = base, out
        if base.dtype == out.dtype:
            as_bits = INTEGERS[base.element_size()]
            bits = base.view(as_bits), out.view(as_bits)
        delta, sums = _sums(base, acc, out, *bits, scale)
        expected = 0.0, 0.0
        if target == acc.dtype:
            expected = 0.0, 1.0
        elif target is not None:
            expected = _predict(acc, delta, target, unit)
        weight_square, delta_square, error_square, changed = sums
        return Measured(
            acc.numel(), weight_square, delta_square, error_square, int(changed), *expected
        )


def _together(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rows of blocks one below the other; cells of wide rows one beside the other."""
    if len(parts) == 1:
        return parts[0]
    if len({part.shape[1] for part in parts}) == 1:
        return torch.cat(list(parts))
    return torch.cat([part.reshape(1, -1) for part in parts], dim=1)


def _predict(
    acc: torch.Tensor, delta: torch.Tensor, target: torch.dtype, unit: float
) -> tuple[float, float]:
    """(Σ error² / ΣΔ², share that changes) by the size of the change in each row."""
    height = min(len(acc), _ROWS)
    rows = slice(None, None, len(acc) // height)
    cols = slice(None, None, max(1, acc.shape[1] * height // _ELEMENTS))
    sigma = torch.linalg.vector_norm(delta[rows], dim=1, keepdim=True, dtype=torch.float64)
    # From here on on the CPU: for so few a GPU would load, even compile, a dozen kernels.
    sigma, values = sigma.cpu() / (math.sqrt(delta.shape[1]) * unit), acc[rows, cols].cpu() / unit
    moved = sigma[:, 0] > 0  # (rows, 1)
    share = float(moved.double().mean())
    if share == 0.0:
        return 0.0, 0.0
    values, sigma = values[moved], sigma[moved]
    error, changed = rounding.expected_rounding(values, sigma.expand_as(values), target)
    return error / float(sigma.square().mean()), changed * share


def count_differing(one: torch.Tensor, other: torch.Tensor) -> int:
    """Elements whose bits differ; both of the same shape and type."""
    if one.device.type == "cpu":
        return int(np.count_nonzero(bits_of(one) != bits_of(other)))
    bits = INTEGERS[one.element_size()]
    return int(torch.count_nonzero(one.view(bits) != other.view(bits)))


@OneCall
def _square(matrix: Tensor) -> float:
    """Σx², summed in float64 only where float32 cannot hold the squares."""
    flat = matrix.view(-1)
    found = float(torch.dot(flat, flat))
    is_held = found > 1e-30 and found < math.inf
    return found if is_held else float(flat.double().square().sum())


@partial(OneCall, uses=[_square])
def _sums(
    base: Tensor, acc: Tensor, out: Tensor, base_bits: Tensor, out_bits: Tensor, scale: float
) -> tuple[Tensor, list[float]]:
    """The change, acc - scale · base, and what `Measured` says of all elements together.

    Args:
        base: (m, n).
        acc: (m, n).
        out: (m, n).
        base_bits: the base as integers, if both are of one type.
        out_bits: likewise.
        scale: of the base.

    Returns:
        (m, n) of the type of ``acc``; weight, change and error squared, elements that change.
    """
    work = torch.empty_like(acc).copy_(out).sub_(acc)
    error = _square(work)
    work.copy_(base)
    if scale != 1.0:
        work.mul_(scale)
    weight = _square(work)
    if out.dtype == base.dtype:
        changed = torch.count_nonzero(out_bits != base_bits)
    else:
        changed = torch.count_nonzero(acc != work)
    torch.sub(acc, work, out=work)
    return work, [weight, _square(work), error, float(changed)]
