"""Which bytes of its inputs a plan reads, known before it runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from loratool.adapter import DeltaSpec, Source, TensorRef
from loratool.dtypes import DTYPES
from loratool.engine import grid
from loratool.engine.rows import args_of, op_of
from loratool.plan import DeltaPart, Plan, Step
from loratool.store.remote_spans import Range


def cut_step(step: Step, *, elements: int, chunk: int, sample: bool) -> list[list[grid.Block]]:
    """The pieces in which a step reads its inputs: runs of neighbouring blocks.

    Args:
        step: of a plan.
        elements: block size of the grid.
        chunk: bytes per piece.
        sample: only the first, the middle and the last block of a tensor that changes.
    """
    op = op_of(step)
    if sample and not op.is_sampled:
        return []
    if op.is_module:
        return [[grid.Block(0, 0, 1, 0, 1, 0)]]
    if op.reads_bytes:
        return grid.chunks(grid.blocks(step.view, 1 << 16), chunk)
    cut = grid.blocks(step.view, elements)
    if sample:
        return [[cut[i]] for i in sorted({0, len(cut) // 2, len(cut) - 1})] if cut else []
    widest = max(DTYPES[s.dtype].bits // 8 for s in (*step.inputs, step.output))
    pairs = len(args_of(step).names) or 1 if op.has_pairs else 1
    return [
        [replace(block, pair=pair) for block in piece]
        for pair in range(pairs)
        for piece in grid.chunks(cut, chunk // widest)
    ]


def planned_ranges(plan: Plan, *, elements: int, sample: bool) -> Iterator[Range]:
    """Everything that `execute` will read from files."""
    for step in plan.steps:
        blocks = cut_step(step, elements=elements, chunk=1, sample=True) if sample else []
        if sample and not blocks:
            continue
        for part in step.parts:
            if isinstance(part, DeltaPart):
                yield from factor_ranges([part.spec])
            elif part.rows is not None:  # a whole tensor's replacement is one of the inputs
                yield from _whole([part.source])
        if not sample or _sees_whole_base(step):
            yield from _whole(step.inputs)
            continue
        for source in step.inputs:
            if isinstance(source, TensorRef):
                size = DTYPES[source.dtype].bits // 8
                for (block,) in blocks:
                    yield from source.ranges(block.start * size, (block.start + block.numel) * size)


def factor_ranges(specs: Iterable[DeltaSpec]) -> Iterator[Range]:
    """The factors of deltas."""
    for spec in specs:
        yield from _whole(spec.fields.values())


def _whole(sources: Iterable[Source]) -> Iterator[Range]:
    for source in sources:
        if isinstance(source, TensorRef):
            yield from source.ranges()


def _sees_whole_base(step: Step) -> bool:
    """True if a delta needs norms or singular vectors of the weight that it changes."""
    return any(isinstance(part, DeltaPart) and (part.spec.reach != "block") for part in step.parts)
