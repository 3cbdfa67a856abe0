"""Which bytes of its inputs a plan reads, known before it runs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from itertools import accumulate

from loratool.adapter import DeltaSpec, Source, TensorRef
from loratool.dtypes import DTYPES
from loratool.engine import grid
from loratool.engine.rows import args_of, op_of
from loratool.frozen import replace
from loratool.location import RemoteFile
from loratool.plan import DeltaPart, Plan, Step
from loratool.store.remote_spans import Range

MOST_SAMPLED, FEWEST_SAMPLED = 256, 8
"""Tensors that a dry run looks into: more would tell little more, and large models have 100,000."""

MOST_CHANGES = 4096
"""Changes, of all adapters, that it loads for that."""


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
    if sample:
        return [[block] for block in grid.ends_and_middle(step.view, elements)]
    cut = grid.blocks(step.view, elements)
    widest = max(DTYPES[s.dtype].bits // 8 for s in (*step.inputs, step.output))
    pieces = grid.chunks(cut, chunk // widest)
    if not op.has_pairs:
        return pieces
    pairs = range(max(1, len(args_of(step).names)))
    return [[replace(block, pair=pair) for block in piece] for pair in pairs for piece in pieces]


def sampled_steps(plan: Plan) -> list[int]:
    """The steps that a dry run looks into: all that change something, of very many a few.

    Which of many is decided by their names, so that no layer and no kind of module is favoured.
    """
    found = [n for n, step in enumerate(plan.steps) if op_of(step).is_sampled and all(step.view)]
    drawn = {n: hashlib.sha256(plan.steps[n].output.name.encode()).digest() for n in found}
    found.sort(key=drawn.__getitem__)
    changes = accumulate(len(plan.steps[n].parts) for n in found)
    enough = sum(count <= MOST_CHANGES for count in changes)
    return sorted(found[: min(MOST_SAMPLED, max(enough, FEWEST_SAMPLED))])


def sampled_bytes(plan: Plan, *, elements: int) -> int:
    """What a dry run reads of the tensors that it looks into."""
    total = 0
    for step in (plan.steps[n] for n in sampled_steps(plan)):
        blocks = cut_step(step, elements=elements, chunk=1, sample=True)
        sizes = (DTYPES[s.dtype].bits // 8 for s in step.inputs)
        total += sum(sizes) * sum(block.numel for (block,) in blocks)
    return total


def planned_ranges(plan: Plan, *, elements: int, sample: bool) -> Iterator[Range]:
    """Everything remote that `execute` will read."""
    chosen = [plan.steps[n] for n in sampled_steps(plan)] if sample else plan.steps
    for step in chosen:
        if not any(isinstance(ref.file, RemoteFile) for ref in step.refs()):
            continue
        blocks = cut_step(step, elements=elements, chunk=1, sample=True) if sample else []
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
