"""The merge kernel on whole pieces: many threads of one interpreter, few calls by each."""

from __future__ import annotations

import torch

from loratool.engine import grid
from loratool.engine.kernel import INTEGERS, cut_piece
from loratool.engine.merging import AddDeltas
from loratool.engine.rounders import Nearest, has_negative_zeros
from loratool.linalg import rounding

# float type -> the bits of infinity; above them are NaNs only
_INFINITY = {
    torch.bfloat16: 0x7F80,
    torch.float16: 0x7C00,
    torch.float32: 0x7F80_0000,
    torch.float64: 0x7FF0 << 48,
}


class AddInPieces(AddDeltas):
    """`AddDeltas`, which takes it that a piece is as nearly all are: finite, and without a -0.

    So nothing is asked of single blocks: with many threads every call of torch or numpy is a
    wait for the interpreter's lock.  A piece that is not so is done again, block by block.
    """

    def run_piece(
        self, piece: list[grid.Block], inputs: list[torch.Tensor], out: torch.Tensor | None
    ) -> None:
        """Fill ``out`` from the sums, and look at all of it once."""
        if out is None or not self._hopes(inputs[0], out) or not self._add(piece, inputs, out):
            super().run_piece(piece, inputs, out)

    def _hopes(self, base: torch.Tensor, out: torch.Tensor) -> bool:
        """Whether `_add` is worth a try."""
        if out.is_cuda or out.dtype not in _INFINITY or type(self.rounder) is not Nearest:
            return False
        return out.dtype != base.dtype or not has_negative_zeros(base)

    def _add(
        self, piece: list[grid.Block], inputs: list[torch.Tensor], out: torch.Tensor
    ) -> bool:  # fmt: skip
        """True if all of the output is finite; else `run` has to see who is not, and why."""
        for block, blocks, made in cut_piece(piece, inputs, out):
            assert made is not None
            acc = self.sum(block, blocks)
            rounding.round_into(made, acc)
            self.measure(block, blocks[0], acc, made)
        return _is_finite(out)


def _is_finite(values: torch.Tensor) -> bool:
    """Whether no element is infinity or NaN, by its bits."""
    bits = values.view(INTEGERS[values.element_size()]).numpy()
    unsigned = bits.view(f"u{bits.itemsize}")
    infinity, sign = _INFINITY[values.dtype], 1 << (8 * bits.itemsize - 1)
    return bool(bits.max() < infinity and unsigned.max() < sign + infinity)
