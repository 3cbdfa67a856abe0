"""The merge kernel on whole pieces: many threads of one interpreter, few calls by each."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from loratool.engine import grid
from loratool.engine.merging import AddDeltas
from loratool.engine.products import TOGETHER, Products, look
from loratool.engine.rounders import Exact, Nearest, differing
from loratool.linalg import rounding


class AddInPieces(AddDeltas):
    """`AddDeltas`, which takes it that a piece is as nearly all are: finite, and without a -0.

    So nothing is asked of single blocks, and where changes are products of factors all of it is
    one call: with many threads every call of torch or numpy is a wait for the interpreter's lock.
    A piece that is not so is done again, block by block.
    """

    _products: Products | None = None

    def prepare(self) -> None:
        """As of a sum, and see whether it is one of products."""
        super().prepare()
        deltas = self.rounder.singles if isinstance(self.rounder, Exact) else self.deltas
        is_plain = deltas is not None and not self.dense and self.scale == 1.0
        if is_plain and self.step.view[1] <= grid.WIDE_COLS:
            self._products = Products.of(deltas or (), self.step.view[1])

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
        if out.is_cuda or not out.is_floating_point():
            return False
        if isinstance(self.rounder, Exact):
            return self._products is not None
        return type(self.rounder) is Nearest

    def _add(
        self, piece: list[grid.Block], inputs: list[torch.Tensor], out: torch.Tensor
    ) -> bool:  # fmt: skip
        """False if the base holds a -0, or the output what is not finite: `run` sees which."""
        kept: list[torch.Tensor] = []
        if isinstance(self.rounder, Exact):
            self._add_exactly(self.rounder, piece, inputs[0], out, kept)
        elif self._products is not None and out.dtype != torch.float16:
            self._sum_together(piece, inputs, out, kept)
        else:
            for at, run in _runs(piece):
                acc = self._sum_together(run, [one[at] for one in inputs], None, kept)
                rounding.round_into(out[at], acc)
        at_stake = [block for block in piece if self._keeps(block)]
        is_simple, ends = look(inputs[0], out, at_stake, piece[0].start, self.rows_kept.stride)
        if is_simple:
            for block, sums, old, new in zip(at_stake, kept, ends[::2], ends[1::2], strict=True):
                self.rows_kept.put(block.index, old, sums, new)
        return is_simple

    def _add_exactly(
        self, rounder: Exact, piece: list[grid.Block], base: torch.Tensor, out: torch.Tensor,
        kept: list[torch.Tensor],
    ) -> None:  # fmt: skip
        """Round sums where float32 decides, and look again at all others together."""
        assert self._products is not None
        take, device, open_ = self.env.scratch.take, self.env.device, []
        for at, run in _runs(piece):
            acc = self._sum_together(run, [base[at]], None, kept)
            work = take("work", (2, max(block.numel for block in run)), torch.float32, device)
            high = take("high", (1, len(acc)), out.dtype, device)[0]
            self._products.bound(base[at], acc, work, out[at], high, _rows(run),
                                 rounder.single_unit)  # fmt: skip
            open_.append(differing(out[at], high) + at.start)
        rows = [one.view(-1, self.step.view[1]) for one in (base, out)]
        rounder.look_again(_as_one(piece), rows[:1], rows[1], torch.cat(open_))

    def _sum_together(
        self, blocks: list[grid.Block], inputs: list[torch.Tensor], out: torch.Tensor | None,
        kept: list[torch.Tensor],
    ) -> torch.Tensor:  # fmt: skip
        """W + Σ deltas of neighbouring blocks, into ``out`` or, if None, into the scratch returned.

        What is to be kept of the sums is added to ``kept``.
        """
        sizes = [sum(block.numel for block in run) for _, run in _runs(blocks)]
        dtype = torch.float32 if isinstance(self.rounder, Exact) else self.dtype
        acc = self.env.scratch.take("acc", (1, max(sizes)), dtype, self.env.device)
        stride = self.rows_kept.stride
        if self._products is not None:
            firsts = [block.r0 for block in blocks if self._keeps(block)]
            kept += self._products.add(inputs[0], acc, out, _rows(blocks), firsts, stride)
            return acc[0]
        acc = acc[0]
        rounding.widen_into(acc, inputs[0])
        for block in blocks:
            sums = _matrix(block, acc, blocks)
            self.add_changes(sums, block, [_matrix(block, one, blocks) for one in inputs],
                             self.deltas)  # fmt: skip
            if self._keeps(block):
                kept.append(sums[-block.r0 % stride :: stride].clone())
        return acc

    def _keeps(self, block: grid.Block) -> bool:
        return self.rows_kept.takes(block.index)


def _runs(piece: list[grid.Block]) -> Iterator[tuple[slice, list[grid.Block]]]:
    """Blocks that go together, and where their elements lie in a buffer of the piece."""
    for i in range(0, len(piece), TOGETHER):
        run = piece[i : i + TOGETHER]
        start = run[0].start - piece[0].start
        yield slice(start, start + sum(block.numel for block in run)), run


def _rows(run: list[grid.Block]) -> list[int]:
    """Where blocks begin, and where the last one ends."""
    return [*(block.r0 for block in run), run[-1].r1]


def _matrix(block: grid.Block, buffer: torch.Tensor, piece: list[grid.Block]) -> torch.Tensor:
    """A block (rows, cols) in a flat buffer of neighbouring ones."""
    start = block.start - piece[0].start
    return buffer[start : start + block.numel].view(block.r1 - block.r0, -1)


def _as_one(piece: list[grid.Block]) -> grid.Block:
    """Neighbouring blocks of whole rows as one."""
    first, last = piece[0], piece[-1]
    return grid.Block(first.index, first.r0, last.r1, first.c0, first.c1, first.start)
