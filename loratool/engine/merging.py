"""W' = round(W + Σ deltas): the kernel behind merge, and its comparison with a finished one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from loratool.delta.base import Delta
from loratool.delta.combined import Combined, Cut
from loratool.delta.load import load_delta
from loratool.delta.placed import Placed
from loratool.delta.vector import Rows
from loratool.engine import grid
from loratool.engine.buffers import torch_dtype
from loratool.engine.combining import random_keys
from loratool.engine.gate import Gate
from loratool.engine.kernel import Env, Kernel
from loratool.engine.measuring import Measured, Sample
from loratool.engine.rounders import Exact, make_rounder
from loratool.engine.step_args import SumArgs
from loratool.frozen import asdict, replace
from loratool.linalg import rounding
from loratool.linalg.dense import DenseCombiner
from loratool.methods import find_method
from loratool.plan import DeltaPart, ReplacePart, Span, Step


class SumResult(Measured, kw_only=True):
    """What one tensor's merge did.

    Attributes:
        name: output tensor.
        dtype: output type.
        settled: elements that needed an exact sum (``--exact``).
        nonfinite: values that are NaN or infinity (``--allow-nonfinite``).
    """

    name: str
    dtype: str
    settled: int = 0
    nonfinite: int = 0


class AddDeltas(Kernel):
    """W' = round(W + Σ deltas), once; also plain casts (no deltas)."""

    args: SumArgs

    def __init__(self, step: Step, env: Env) -> None:
        super().__init__(step, env)
        self.target = torch_dtype(step.output.dtype)
        self.rounder = make_rounder(self.args, self.target, env, step.output.name)
        self.dtype = self.rounder.dtype
        self.scale = self.args.scale
        self.anchor = self.args.anchor  # the input that changes refer to as W
        self.deltas: list[Delta] = []
        self.dense: list[tuple[int, float]] = []  # (input position, weight) of whole replacements
        self.rows_kept = Sample(step.view, env.elements)
        self._gate = Gate(
            step.output.name, step.output.dtype, self.limit, allow_nonfinite=env.allow_nonfinite
        )

    @property
    def limit(self) -> torch.dtype:
        """The type whose largest number no sum may pass."""
        return self.target

    def prepare(self) -> None:
        """Load factors, fold coefficients in, measure norms where a delta asks for it."""
        whole = [p for p in self.step.parts if isinstance(p, ReplacePart) and p.rows is None]
        self.dense = [(1 + i, part.weight) for i, part in enumerate(whole)]
        rows = [p for p in self.step.parts if isinstance(p, ReplacePart) and p.rows is not None]
        # Beside W, what it is added to has changes of its own in these rows.
        is_alone = len(rows) == 1 and not whole and self.anchor == 0
        self.deltas = [self._rows(part, exact=is_alone) for part in rows]
        changes = [p for p in self.step.parts if isinstance(p, DeltaPart)]
        if self.args.method is not None:
            self.deltas.extend(self._combined(group) for group in _by_target(changes))
            self._survey([d for d in self.deltas if d.wants_survey])
        else:
            self.deltas.extend(map(self._build, changes))
        if isinstance(self.rounder, Exact):
            base = self.step.inputs[0].dtype
            plain = self.scale == 1.0 and self.anchor == 0 and base in ("BF16", "F16", "F32")
            self.rounder.begin(self.deltas, self.dense, plain=plain)
        self.measure_norms()

    def measure_norms(self) -> None:
        """Pass W by the deltas that need its norms."""
        wanting = [d for d in self.deltas if d.needs_measure]
        if wanting:
            for block, base in self.env.stream(self.step.inputs[self.anchor], self.step.view):
                wide = base.to(self.dtype)
                for delta in wanting:
                    delta.measure(wide, block.r0, block.r1, block.c0, block.c1)

    def _rows(self, part: ReplacePart, exact: bool) -> Rows:
        assert part.rows is not None
        values = self.env.load(part.source).to(self.env.device, self.dtype)
        index = torch.tensor(part.rows, dtype=torch.int64, device=self.env.device)
        return Rows(self.step.view, index, values, part.weight, exact)

    def _combined(self, parts: list[DeltaPart]) -> Delta:
        """What an element-wise method makes of the same region of several adapters."""
        region, params = parts[0].region, self.args.params or {}
        whole = replace(region, source_rows=None, source_cols=None)
        parts = [replace(p, region=whole) for p in parts]
        first = parts[0]
        deltas = [self._make(p, p.spec.scaling) for p in parts]
        for delta in deltas:
            delta.to(self.env.device)
        total = deltas[0].shape[0] * deltas[0].shape[1]
        combiner = DenseCombiner(
            find_method(self.args.method or ""), params, [p.weight for p in parts], total,
            random_keys(params, first.spec.name, parts),
        )  # fmt: skip
        offset = (first.expert or 0) * total
        made = Combined(deltas, combiner, first.transposed, offset)
        if region == whole:
            return self._place(made, first)
        return self._place(Cut(made, region.source_rows, region.source_cols), first)

    def _survey(self, wanting: list[Delta]) -> None:
        """Passes over the changes alone, on the blocks that the sums are formed on."""
        like = torch.empty(0, dtype=self.dtype, device=self.env.device)
        blocks = grid.blocks(self.step.view, self.env.elements)

        def see(block: grid.Block) -> None:
            for delta in wanting:
                delta.survey(like, block.r0, block.r1, block.c0, block.c1)

        while wanting:
            self.share(see, blocks)
            for delta in wanting:
                delta.end_survey()
            wanting = [d for d in wanting if d.wants_survey]

    def _make(self, part: DeltaPart, coefficient: float) -> Delta:
        fold = not isinstance(self.rounder, Exact)
        return load_delta(part, self.env.load, coefficient=coefficient, dtype=self.dtype, fold=fold)

    def _build(self, part: DeltaPart) -> Delta:
        made = self._make(part, part.weight * part.spec.scaling)
        if made.needs_whole:
            source = self.step.inputs[self.anchor]
            made.begin(self.env.load(source, must_be_finite=True).view(self.step.view))
        placed = self._place(made, part)
        if placed.needs_rows:
            placed.attach(partial(self.env.rows, self.step.inputs[self.anchor], self.step.view))
        return placed

    def _place(self, delta: Delta, part: DeltaPart) -> Delta:
        delta.to(self.env.device)
        if not part.region.rows and not part.region.cols:
            return delta
        return Placed(delta, part.region, self.step.view, self.env.device)

    def run(self, block: grid.Block, inputs: list[torch.Tensor], out: torch.Tensor | None) -> None:
        """Sum in the accumulator's type, round once into ``out``, keep the sums of the report."""
        base, bad = inputs[0], None
        acc = self._first_look(block, inputs)
        if acc is None:
            acc = self.sum(block, inputs)
            bad = self._gate.see(block.index, block.start, acc)
        out = self.store(block, inputs, acc, out)
        if bad is not None:
            base, acc, out = (x.masked_fill(bad, 0.0) for x in (base, acc, out))
        self.rows_kept.keep(block.index, block.r0, base, acc, out)

    def sum(self, block: grid.Block, inputs: list[torch.Tensor]) -> torch.Tensor:
        """W + Σ deltas of a block, in the accumulator's type."""
        return self._sum(block, inputs, self.deltas, self.dtype)

    def _first_look(self, block: grid.Block, inputs: list[torch.Tensor]) -> torch.Tensor | None:
        """The same in float32, for `Exact`; None if that is not asked for, or not harmless."""
        if not isinstance(self.rounder, Exact) or self.rounder.singles is None:
            return None
        acc = self.sum_singles(block, inputs, self.rounder)
        return acc if self._gate.passes(acc) else None

    def sum_singles(
        self, block: grid.Block, inputs: list[torch.Tensor], rounder: Exact
    ) -> torch.Tensor:
        """`sum` in float32, where a rounder has deltas for that."""
        assert rounder.singles is not None
        return self._sum(block, inputs, rounder.singles, torch.float32)

    def _sum(
        self, block: grid.Block, inputs: list[torch.Tensor], deltas: Sequence[Delta],
        dtype: torch.dtype,
    ) -> torch.Tensor:  # fmt: skip
        shape = (inputs[0].shape[0], inputs[0].shape[1])
        acc = self.env.scratch.take("acc", shape, dtype, self.env.device)
        rounding.widen_into(acc, inputs[0])
        self.add_changes(acc, block, inputs, deltas)
        return acc

    def add_changes(
        self, acc: torch.Tensor, block: grid.Block, inputs: Sequence[torch.Tensor],
        deltas: Sequence[Delta],
    ) -> None:  # fmt: skip
        """Make W + Σ deltas of a block's W, in place."""
        weight = acc
        if self.dense or not all(d.is_additive for d in deltas):
            shape = (acc.shape[0], acc.shape[1])
            weight = self.env.scratch.take("weight", shape, acc.dtype, self.env.device)
            rounding.widen_into(weight, inputs[self.anchor])
        for position, factor in self.dense:
            acc.add_(inputs[position].to(acc.dtype).sub_(weight), alpha=factor)
        for delta in deltas:
            delta.add_to(acc, weight, block.r0, block.r1, block.c0, block.c1)
        if self.scale != 1.0:
            acc.mul_(self.scale)

    def store(
        self,
        block: grid.Block,
        inputs: list[torch.Tensor],
        acc: torch.Tensor,
        out: torch.Tensor | None,
    ) -> torch.Tensor:
        """Fill ``out`` from the sums; returns the numbers that it then stands for."""
        if out is None:
            shape = (acc.shape[0], acc.shape[1])
            out = self.env.scratch.take("out", shape, self.target, self.env.device)
        self.rounder.round(block, inputs, acc, out)
        return out

    @property
    def unit(self) -> float:
        """Spacing of the output's numbers at 1, in units of the target type's."""
        return 1.0

    def measure(self) -> Measured:
        """What became of the rows that stand for all."""
        changes = bool(self.deltas or self.dense)
        return self.rows_kept.measure(self.scale, self.target if changes else None, self.unit)

    def finish(self) -> SumResult:
        """Add the blocks up, in their order.

        Raises:
            NumericError: the result overflows the output type or is not a number.
        """
        nonfinite = self._gate.finish()
        found = self.measure()
        settled = sum(self.rounder.settled.values())
        name, dtype = self.step.output.name, self.step.output.dtype
        return SumResult(
            name=name, dtype=dtype, settled=settled, nonfinite=nonfinite, **asdict(found)
        )


def _by_target(parts: list[DeltaPart]) -> list[list[DeltaPart]]:
    """Parts of several adapters that change the same elements, together."""
    groups: dict[tuple[tuple[Span, ...], tuple[Span, ...]], list[DeltaPart]] = {}
    for part in parts:
        groups.setdefault((part.region.rows, part.region.cols), []).append(part)
    return list(groups.values())
