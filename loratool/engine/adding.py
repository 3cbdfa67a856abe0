"""The merge kernel on whole pieces: many threads of one interpreter, few calls by each."""

from __future__ import annotations

import torch

from loratool.engine import grid
from loratool.engine.buffers import Cut
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

_TOGETHER = 2  # blocks: sums of more leave the cache


class AddInPieces(AddDeltas):
    """`AddDeltas`, which takes it that a piece is as nearly all are: finite, and without a -0.

    So nothing is asked of single blocks: with many threads every call of torch or numpy is a
    wait for the interpreter's lock.  A piece that is not so is done again, block by block.
    """

    def run_piece(
        self, piece: list[grid.Block], inputs: list[torch.Tensor], out: torch.Tensor | None
    ) -> None:
        """Fill ``out`` from the sums, and look at all of it once."""
        if out is not None and self._is_simple(out) and self._add(piece, inputs, out):
            return
        for block in piece:
            self.rounder.settled.pop(block.index, None)
        super().run_piece(piece, inputs, out)

    def _is_simple(self, out: torch.Tensor) -> bool:
        """Whether `_add` knows the rounding and the type."""
        if out.is_cuda or out.dtype not in _INFINITY:
            return False
        if isinstance(self.rounder, Exact):
            return self.rounder.singles is not None and self.step.view[1] <= grid.WIDE_COLS
        return type(self.rounder) is Nearest

    def _add(
        self, piece: list[grid.Block], inputs: list[torch.Tensor], out: torch.Tensor
    ) -> bool:  # fmt: skip
        """False if the base holds a -0, or the output what is not finite: `run` sees which."""
        base = self.env.scratch.cut("input 0", inputs[0], piece)
        if out.dtype == inputs[0].dtype and has_negative_zeros(base.bits):
            return False
        if isinstance(self.rounder, Exact):
            self._add_exactly(self.rounder, piece, inputs, out)
        else:
            self._add_nearest(piece, inputs, out)
        return _is_finite(self.env.scratch.cut("output", out, piece))

    def _add_nearest(
        self, piece: list[grid.Block], inputs: list[torch.Tensor], out: torch.Tensor
    ) -> None:
        """Widen and round several blocks at once; products keep to the grid."""
        take, cut = self.env.scratch.take, self.env.scratch.cut
        cells = list(self.cut(piece, inputs, out))
        runs = [cells[i : i + _TOGETHER] for i in range(0, len(cells), _TOGETHER)]
        lines = [_as_line([block for block, _, _ in run]) for run in runs]
        bases, mades = cut("base", inputs[0], lines).blocks, cut("made", out, lines).blocks
        for run, base, made in zip(runs, bases, mades, strict=True):
            acc = take("acc", (1, base.shape[1]), self.dtype, self.env.device)
            rounding.widen_into(acc, base)
            sums = cut("acc", acc, [block for block, _, _ in run]).blocks
            for (block, blocks, _), one in zip(run, sums, strict=True):
                self.add_changes(one, block, blocks, self.deltas)
            rounding.round_into(made, acc)
            for (block, blocks, own), one in zip(run, sums, strict=True):
                assert own is not None
                self.rows_kept.keep(block.index, block.r0, blocks[0], one, own)

    def _add_exactly(
        self, rounder: Exact, piece: list[grid.Block], inputs: list[torch.Tensor], out: torch.Tensor
    ) -> None:
        """Look once at all that float32 leaves open, but for blocks whose rows are kept."""
        open_ = []
        for block, blocks, made in self.cut(piece, inputs, out):
            assert made is not None
            acc = self.sum_singles(block, blocks, rounder)
            at = rounder.round_decided(block, blocks, acc, made)
            if self.rows_kept.takes(block.index):
                rounder.look_again(block, blocks, made, at)
                self.rows_kept.keep(block.index, block.r0, blocks[0], acc, made)
            else:
                open_.append(at + (block.start - piece[0].start))
        if open_:
            view = -1, self.step.view[1]
            rows = [one.view(view) for one in inputs]
            rounder.look_again(_as_one(piece), rows, out.view(view), torch.cat(open_))


def _as_line(blocks: list[grid.Block]) -> grid.Block:
    """Neighbouring blocks as one row."""
    first = blocks[0]
    return grid.Block(first.index, 0, 1, 0, sum(block.numel for block in blocks), first.start)


def _as_one(piece: list[grid.Block]) -> grid.Block:
    """Neighbouring blocks of whole rows as one."""
    first, last = piece[0], piece[-1]
    return grid.Block(first.index, first.r0, last.r1, first.c0, first.c1, first.start)


def _is_finite(made: Cut) -> bool:
    """Whether no element is infinity or NaN, by its bits."""
    infinity, sign = _INFINITY[made.values.dtype], 1 << (8 * made.bits.itemsize - 1)
    return bool(made.bits.max() < infinity and made.unsigned.max() < sign + infinity)
