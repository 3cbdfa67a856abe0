"""The merge kernel on whole pieces: many threads of one interpreter, few calls by each."""

from __future__ import annotations

import torch

from loratool.engine import grid
from loratool.engine.kernel import INTEGERS, cut_piece
from loratool.engine.merging import AddDeltas
from loratool.engine.rounders import Exact, Nearest, has_negative_zeros
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
        if out is not None and self._hopes(inputs[0], out) and self._add(piece, inputs, out):
            return
        for block in piece:
            self.rounder.settled.pop(block.index, None)
        super().run_piece(piece, inputs, out)

    def _hopes(self, base: torch.Tensor, out: torch.Tensor) -> bool:
        """Whether `_add` is worth a try."""
        if out.is_cuda or out.dtype not in _INFINITY or not self._is_simple:
            return False
        return out.dtype != base.dtype or not has_negative_zeros(base)

    @property
    def _is_simple(self) -> bool:
        if isinstance(self.rounder, Exact):
            return self.rounder.singles is not None and self.step.view[1] <= grid.WIDE_COLS
        return type(self.rounder) is Nearest

    def _add(
        self, piece: list[grid.Block], inputs: list[torch.Tensor], out: torch.Tensor
    ) -> bool:  # fmt: skip
        """True if all of the output is finite; else `run` has to see who is not, and why."""
        if isinstance(self.rounder, Exact):
            self._add_exactly(self.rounder, piece, inputs, out)
        else:
            for block, blocks, made in cut_piece(piece, inputs, out):
                assert made is not None
                acc = self.sum(block, blocks)
                rounding.round_into(made, acc)
                self.measure(block, blocks[0], acc, made)
        return _is_finite(out)

    def _add_exactly(
        self, rounder: Exact, piece: list[grid.Block], inputs: list[torch.Tensor], out: torch.Tensor
    ) -> None:
        """Look once at all that float32 leaves open, but for blocks that are measured."""
        open_ = []
        for block, blocks, made in cut_piece(piece, inputs, out):
            assert made is not None
            acc = self.sum_singles(block, blocks, rounder)
            at = rounder.round_decided(block, blocks, acc, made)
            if self.is_measured(block):
                rounder.look_again(block, blocks, made, at)
                self.measure(block, blocks[0], acc, made)
            else:
                open_.append(at + (block.start - piece[0].start))
        if open_:
            view = -1, self.step.view[1]
            rows = [one.view(view) for one in inputs]
            rounder.look_again(_as_one(piece), rows, out.view(view), torch.cat(open_))


def _as_one(piece: list[grid.Block]) -> grid.Block:
    """Neighbouring blocks of whole rows as one."""
    first, last = piece[0], piece[-1]
    return grid.Block(first.index, first.r0, last.r1, first.c0, first.c1, first.start)


def _is_finite(values: torch.Tensor) -> bool:
    """Whether no element is infinity or NaN, by its bits."""
    bits = values.view(INTEGERS[values.element_size()]).numpy()
    unsigned = bits.view(f"u{bits.itemsize}")
    infinity, sign = _INFINITY[values.dtype], 1 << (8 * bits.itemsize - 1)
    return bool(bits.max() < infinity and unsigned.max() < sign + infinity)
