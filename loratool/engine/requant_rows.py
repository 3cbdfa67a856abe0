"""W + Σ deltas in codes that lie as rows with their factors, turned or packed: mxfp4.

Sums are formed on strips of the rows that the codes lie in, which depend on the shape alone: the
step that writes codes and the one that writes factors see the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from loratool.adapter import CodedRef
from loratool.engine import grid
from loratool.engine.kernel import Env
from loratool.engine.measuring import Measured
from loratool.engine.merging import AddDeltas, SumResult
from loratool.engine.rows import args_of
from loratool.engine.step_args import RequantizeArgs
from loratool.frozen import replace
from loratool.plan import Step
from loratool.quant import codec_of


class RequantizeRows(AddDeltas):
    """Codes of the sums; the report measures the numbers that they stand for."""

    args: RequantizeArgs
    place = 0  # of what is written, in what `encode_rows` returns

    def __init__(self, step: Step, env: Env) -> None:
        args = args_of(step)
        assert isinstance(args.coded, CodedRef)
        self.coded = args.coded
        output = replace(step.output, shape=self.coded.shape)
        super().__init__(replace(step, inputs=step.inputs[1:], view=args.view, output=output), env)
        self.coder = codec_of(self.coded.codec).row_coder
        self.outs, self.cols = self.coded.shape[-1], self.coded.shape[-2]
        self.height = max(1, env.elements // max(1, self.cols))

    @property
    def limit(self) -> torch.dtype:
        """Factors grow with the sums."""
        return torch.float32

    def run(self, block: grid.Block, inputs: list[torch.Tensor], out: torch.Tensor | None) -> None:
        """Code the strips that a block of rows lies in, and take the block out of them."""
        for strip, first, last in self._strips(block.r0, block.r1):
            made = self._coded(strip, first, last)
            begin, end = max(first, block.r0), min(last, block.r1)
            if out is not None:
                out[begin - block.r0 : end - block.r0] = made[begin - first : end - first]

    def _strips(self, r0: int, r1: int) -> Iterator[tuple[int, int, int]]:
        """(number, first row, last row), none of which runs on from one matrix into the next."""
        each = -(-self.outs // self.height)
        row = r0
        while row < r1:
            matrix, inside = divmod(row, self.outs)
            number = inside // self.height
            first = matrix * self.outs + number * self.height
            last = min(first + self.height, (matrix + 1) * self.outs)
            yield matrix * each + number, first, last
            row = last

    def _coded(self, strip: int, first: int, last: int) -> torch.Tensor:
        """Rows of codes, or of factors."""
        reader, device = self.env.reader, self.env.device
        base = self.coder.load_rows(self.coded, reader, first, last).to(device)
        matrix, col = divmod(first, self.outs)
        block = grid.Block(strip, matrix * self.cols, (matrix + 1) * self.cols, col,
                           col + last - first, matrix * self.cols * self.outs + col)  # fmt: skip
        acc = self.sum(block, [base.T])
        bad = self._gate.see(strip, block.start, acc)
        values = (acc if bad is None else acc.masked_fill(bad, 0.0)).T.contiguous()
        old = self.coder.load_factors(self.coded, reader, first, last).to(device)
        *made, numbers = self.coder.encode_rows(values.double(), old, self.coded)
        if not self.place:
            self.rows_kept.keep(strip, 0, base, values, numbers)
        return made[self.place]

    def measure(self) -> Measured:
        """What coding did to the rows that were looked at; of a dry run that is a sample.

        It is the prediction too: steps of the codes differ from block to block, no formula knows
        them.
        """
        found = self.rows_kept.measure(self.scale, None)
        if not found.delta_square:
            return found
        return replace(
            found, expected_loss=found.error_square / found.delta_square,
            expected_share=found.changed / found.numel,
        )  # fmt: skip


class RequantizeRowFactors(RequantizeRows):
    """The factors under which `RequantizeRows` writes a weight's codes."""

    place = 1

    def finish(self) -> SumResult | None:  # type: ignore[override]
        """Nothing: the other step reports."""
        return None
