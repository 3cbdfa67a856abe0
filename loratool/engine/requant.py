"""W + Σ deltas written in the codes of the base's own format.

Two steps for a weight: one writes the codes, one the factors.  Both pass over the sums first, for
the largest number of each block; a factor that holds its block stays as it is.
"""

from __future__ import annotations

import torch

from loratool.adapter import CodedRef
from loratool.engine import grid
from loratool.engine.kernel import Env, Kernel
from loratool.engine.merging import AddDeltas
from loratool.engine.step_args import RequantizeArgs
from loratool.frozen import replace
from loratool.plan import Step
from loratool.quant import codec_of
from loratool.quant.base import block_rows, factors_at


class Requantize(AddDeltas):
    """Codes of the sums; the report measures the numbers that they stand for."""

    args: RequantizeArgs

    def __init__(self, step: Step, env: Env) -> None:
        super().__init__(step, env)
        self.coder = codec_of(self.coded.codec).recoder
        self.scales: torch.Tensor | None = None

    @property
    def coded(self) -> CodedRef:
        """The base's weight."""
        assert self.args.coded is not None
        return self.args.coded

    @property
    def limit(self) -> torch.dtype:
        """Factors grow with the sums; codes without factors have an end."""
        return self.target if self.coded.scales is None else torch.float32

    def prepare(self) -> None:
        """Besides, settle the factors; a dry run takes the old ones."""
        super().prepare()
        if self.coded.scales is None:
            return
        scales = self.coder.load_scales(self.coded, self.env.reader)
        if not self.env.sample:
            scales = self.coder.fit(self._peaks(scales), self.coded, scales)
        self.scales = scales.to(self.env.device)

    def _peaks(self, scales: torch.Tensor) -> torch.Tensor:
        """The largest size of a sum in each block, float64."""
        peaks = torch.zeros(scales.shape, dtype=torch.float64)
        streams = [self.env.stream(source, self.step.view) for source in self.step.inputs]
        for blocks in zip(*streams, strict=True):
            block = blocks[0][0]
            rows, cols = self._places(block)
            sizes = self.sum(block, [values for _, values in blocks]).double().abs().cpu()
            lines = torch.zeros(len(rows), scales.shape[1], dtype=torch.float64)
            places = (cols // self.coded.block[1]).expand(len(rows), -1)
            lines.scatter_reduce_(1, places, _rows(sizes, rows), "amax")
            places = block_rows(rows, self.coded)[:, None].expand_as(lines)
            peaks.scatter_reduce_(0, places, lines, "amax")
        return peaks

    def store(
        self,
        block: grid.Block,
        inputs: list[torch.Tensor],
        acc: torch.Tensor,
        out: torch.Tensor | None,
    ) -> torch.Tensor:
        """Fill ``out`` with codes; returns the float32 numbers that they stand for."""
        rows, cols = self._places(block)
        factors = torch.ones(1, 1, device=acc.device)
        if self.scales is not None:
            factors = factors_at(self.scales, self.coded, rows.to(acc.device), cols.to(acc.device))
        codes = self.coder.encode(_rows(acc, rows).double(), factors, self.coded)
        if out is not None:
            out.copy_(codes.view(out.shape))
        return self.coder.numbers(codes, factors, self.coded).view(acc.shape)

    def _places(self, block: grid.Block) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows and columns of the weight, its last axis along the columns, that a block covers."""
        width = self.coded.shape[-1] if self.coded.shape else 1
        if self.step.view[1] == width:
            return torch.arange(block.r0, block.r1), torch.arange(block.c0, block.c1)
        first = block.start // width
        return torch.arange(first, first + block.numel // width), torch.arange(width)

    @property
    def unit(self) -> float:
        """The prediction is on the grid of the codes: in units of one factor."""
        if self.scales is None:
            return 1.0
        ones = torch.ones_like(self.scales)
        return float(self.coder.numbers(ones, self.scales, self.coded).double().median())


def _rows(values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """A block as rows of the weight's last axis."""
    return values.reshape(len(rows), -1)


class RequantizeScales(Kernel):
    """The factors under which `Requantize` writes a weight's codes."""

    def __init__(self, step: Step, env: Env) -> None:
        super().__init__(step, env)
        self._scales: torch.Tensor | None = None

    def prepare(self) -> None:
        """Find them as the other step does."""
        coded = self.args.coded
        assert isinstance(coded, CodedRef) and coded.codes is not None
        output = replace(self.step.output, name=coded.name, dtype=coded.codes.dtype,
                         shape=coded.shape)  # fmt: skip
        weight = replace(
            self.step, op="requantize", output=output, inputs=self.step.inputs[1:],
            view=self.args.view,
        )  # fmt: skip
        twin = Requantize(weight, self.env)
        twin.prepare()
        assert twin.scales is not None
        self._scales = twin.coder.store_scales(twin.scales, self.step.output.dtype).view(
            self.step.view
        )

    def run(self, block: grid.Block, inputs: list[torch.Tensor], out: torch.Tensor | None) -> None:
        """Copy a block of them."""
        if out is not None:
            assert self._scales is not None
            out.copy_(self._scales[block.r0 : block.r1, block.c0 : block.c1])
