"""The merge kernel on whole pieces: many threads of one interpreter, few calls by each."""

from __future__ import annotations

import torch

from loratool.engine import grid
from loratool.engine.merging import AddDeltas
from loratool.engine.products import TOGETHER, Products, Wanted, look
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
        if out.is_cuda or not out.is_floating_point() or out.element_size() == 1:
            return False
        if isinstance(self.rounder, Exact):
            return self._products is not None
        return type(self.rounder) is Nearest

    def _add(
        self, piece: list[grid.Block], inputs: list[torch.Tensor], out: torch.Tensor
    ) -> bool:  # fmt: skip
        """False if the base holds a -0, or the output what is not finite: `run` sees which."""
        base, sums = inputs[0], list[torch.Tensor]()
        bits = self.env.scratch.bits(base) if base.dtype == out.dtype else base
        kept = self._kept(piece)
        rows = Wanted.of(kept, piece[0].start, self.rows_kept.stride)
        if self._products is not None and self.rounder.rounds_as_torch:
            acc, starts = self._take_acc(_runs(piece)), _starts(piece)
            is_simple, ends, sums = self._products.merge(base, bits, acc, out, starts, rows)
        else:
            if isinstance(self.rounder, Exact):
                self._add_exactly(self.rounder, piece, base, out, sums)
            else:
                self._add_nearest(piece, inputs, out, sums)
            is_simple, ends = look(base, bits, out, rows)
        if is_simple:
            for block, old, made, new in zip(kept, ends[::2], sums, ends[1::2], strict=True):
                self.rows_kept.put(block.index, old, made, new)
        return is_simple

    def _add_nearest(
        self, piece: list[grid.Block], inputs: list[torch.Tensor], out: torch.Tensor,
        sums: list[torch.Tensor],
    ) -> None:  # fmt: skip
        """Any changes, or any rounding; what is to be kept of the sums goes into ``sums``."""
        for run in _runs(piece):
            at, acc = _elements(run, piece), self._take_acc([run])
            if self._products is not None:
                sums += self._products.add(inputs[0][at], acc, _starts(run), self._wanted(run))
            else:
                rounding.widen_into(acc[0], inputs[0][at])
                for block in run:
                    blocks = [_matrix(block, one, piece) for one in inputs]
                    self.add_changes(_matrix(block, acc[0], run), block, blocks, self.deltas)
                stride = self.rows_kept.stride
                sums += [_matrix(b, acc[0], run)[-b.r0 % stride :: stride].clone()
                         for b in self._kept(run)]  # fmt: skip
            rounding.round_into(out[at], acc[0])

    def _add_exactly(
        self, rounder: Exact, piece: list[grid.Block], base: torch.Tensor, out: torch.Tensor,
        sums: list[torch.Tensor],
    ) -> None:  # fmt: skip
        """Round sums where float32 decides, and look again at all others together."""
        assert self._products is not None
        take, device, open_ = self.env.scratch.take, self.env.device, []
        for run in _runs(piece):
            at, acc, starts = _elements(run, piece), self._take_acc([run]), _starts(run)
            sums += self._products.add(base[at], acc, starts, self._wanted(run))
            work = take("work", (2, max(block.numel for block in run)), torch.float32, device)
            high = take("high", (1, acc.shape[1]), out.dtype, device)[0]
            self._products.bound(base[at], acc[0], work, out[at], high, starts,
                                 rounder.single_unit)  # fmt: skip
            open_.append(differing(out[at], high) + at.start)
        rows = [one.view(-1, self.step.view[1]) for one in (base, out)]
        rounder.look_again(_as_one(piece), rows[:1], rows[1], torch.cat(open_))

    def _take_acc(self, runs: list[list[grid.Block]]) -> torch.Tensor:
        """Scratch (1, n) for the sums of the largest."""
        dtype = torch.float32 if isinstance(self.rounder, Exact) else self.dtype
        size = max(sum(block.numel for block in run) for run in runs)
        return self.env.scratch.take("acc", (1, size), dtype, self.env.device)

    def _kept(self, blocks: list[grid.Block]) -> list[grid.Block]:
        return [block for block in blocks if self.rows_kept.takes(block.index)]

    def _wanted(self, run: list[grid.Block]) -> Wanted:
        return Wanted.of(self._kept(run), run[0].start, self.rows_kept.stride)


def _runs(piece: list[grid.Block]) -> list[list[grid.Block]]:
    """Blocks that go together."""
    return [piece[i : i + TOGETHER] for i in range(0, len(piece), TOGETHER)]


def _starts(blocks: list[grid.Block]) -> list[int]:
    """Rows of W at which blocks begin, and where the last one ends."""
    return [*(block.r0 for block in blocks), blocks[-1].r1]


def _elements(run: list[grid.Block], piece: list[grid.Block]) -> slice:
    """Where blocks of a piece lie in a flat buffer of it."""
    start = run[0].start - piece[0].start
    return slice(start, start + sum(block.numel for block in run))


def _matrix(block: grid.Block, buffer: torch.Tensor, piece: list[grid.Block]) -> torch.Tensor:
    """A block (rows, cols) in a flat buffer of a piece."""
    return buffer[_elements([block], piece)].view(block.r1 - block.r0, -1)


def _as_one(piece: list[grid.Block]) -> grid.Block:
    """Neighbouring blocks of whole rows as one."""
    first, last = piece[0], piece[-1]
    return grid.Block(first.index, first.r0, last.r1, first.c0, first.c1, first.start)
