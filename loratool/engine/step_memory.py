"""What single steps take in memory, by op: every formula, and what was measured for it.

Of steps that are a module of some adapters: `loratool.engine.module_memory`.

Each row of `loratool.engine.rows` names three of these: what a worker takes for a piece, what a
step holds from its first block to its last, and what of its result stays in memory.
"""

from __future__ import annotations

from typing import Any

from loratool.adapter import CodedRef
from loratool.dtypes import DTYPES
from loratool.engine import grid
from loratool.engine.step_args import (
    FactorArgs,
    MakePatchArgs,
    NoArgs,
    RequantizeArgs,
    SubtractAndFactorArgs,
    SumArgs,
)
from loratool.plan import DeltaPart, ReplacePart, Step

ROUNDING_BYTES = (1 << 16) * 16 * 8
"""What exact and stochastic rounding take per worker: sixteen float64 arrays of one piece."""

DECODING_BYTES = 24 << 20
"""What making numbers from codes takes per worker: a strip of them, and the codes around them."""

MEASURED_WHOLE = 1 << 20
"""Elements of a tensor up to which a merge measures every one; of larger ones fewer than that."""

_UNKNOWN_RANK = 256


# ------------------------------------------------------------------ of a worker, for a piece


def copied_piece(step: Step, args: NoArgs, chunk: int, elements: int) -> int:
    """Bytes as they are: one buffer per input."""
    return chunk * len(step.inputs)


def summed_piece(step: Step, args: SumArgs, chunk: int, elements: int) -> int:
    """A piece of every input and of the output, and the sums of a block.

    With a method, of each delta a block, selected, weighted, with signs and masks; of one delta at
    a time positions and random numbers, or ranks within rows: tests/budget/test_combine_memory.py
    """
    piece, block, wide = _sizes(step, chunk, elements)
    accumulator = 4 if step.output.dtype == "BF16" and args.rounding != "exact" else 8
    block += max((_rows_beside(step, part) for part in step.parts), default=0)
    buffers = piece * (len(step.inputs) + 1)
    if args.method is not None:
        return buffers + block * (len(step.parts) * 8 * (accumulator + 1) + 8 * accumulator + 110)
    rounding = 0 if args.rounding == "nearest" else ROUNDING_BYTES
    return buffers + block * (3 * accumulator + 2 * wide) + rounding


def _rows_beside(step: Step, part: DeltaPart | ReplacePart) -> int:
    """Elements of rows that a change wants besides a block, and what it makes of them."""
    if not isinstance(part, DeltaPart) or part.spec.reach != "rows" or is_needed_whole(part):
        return 0
    block = grid.largest_block(step.view, grid.CPU_ELEMENTS)
    return 2 * part.spec.row.together(part.spec) * step.view[1] + block


def is_needed_whole(part: DeltaPart) -> bool:
    """True if a change that goes by rows of W takes all of them together."""
    is_all = part.transposed or not part.spec.row.together(part.spec)
    return part.spec.reach == "rows" and is_all


def measured_piece(step: Step, args: Any, chunk: int, elements: int) -> int:
    """As a sum rounded to nearest."""
    return summed_piece(step, SumArgs(), chunk, elements)


def looked_piece(step: Step, args: SumArgs, chunk: int, elements: int) -> int:
    """W, Δ and their merges in float64, with their temporaries."""
    piece, block, _ = _sizes(step, chunk, elements)
    return piece * (len(step.inputs) + 1) + block * 8 * 12


def _sizes(step: Step, chunk: int, elements: int) -> tuple[int, int, int]:
    """Bytes of a piece, elements of a block, bytes of the widest element."""
    block = grid.largest_block(step.view, elements)
    wide = max(DTYPES[s.dtype].bits // 8 for s in (*step.inputs, step.output))
    coded = sum(isinstance(s, CodedRef) for s in step.inputs)
    return coded * DECODING_BYTES + max(chunk, block * wide), block, wide


# ------------------------------------------------------- of a step, beyond the workers' buffers


def summed_step(step: Step, args: Any) -> int:
    """Factors in the accumulator's type, and a float64 copy while they are made; new rows.

    Besides, the rows that stand for all, joined, and the change in them.
    """
    total = _rows_kept(step) if step.inputs else 0
    for part in step.parts:
        if isinstance(part, DeltaPart):
            total += _held(part) * 16
            if part.spec.reach == "all":
                total += step.view[0] * step.view[1] * 24 + 32 * min(step.view) ** 2
            elif is_needed_whole(part):
                total += _region_numel(step, part) * 32
        elif part.rows is not None:
            total += part.source.numel * 12
    return total


def _rows_kept(step: Step) -> int:
    """Of W, of the sums and of W', twice while they are joined."""
    _, _, wide = _sizes(step, 0, 0)
    accumulator = 4 if step.output.dtype == "BF16" else 8
    numel = step.view[0] * step.view[1]
    if numel > MEASURED_WHOLE:  # an eighth of four blocks
        numel = grid.largest_block(step.view, grid.CPU_ELEMENTS) // 2
    return numel * (4 * wide + 3 * accumulator)


def requantized_step(step: Step, args: RequantizeArgs) -> int:
    """Besides, factors and largest numbers of all blocks, and one block of the pass over them."""
    coded = args.coded
    blocks = 0 if coded is None or coded.scales is None else coded.scales.numel
    return summed_step(step, args) + 24 * blocks + grid.CPU_ELEMENTS * 64


def requantized_rows(step: Step, args: RequantizeArgs) -> int:
    """Besides the factors of changes, a strip with its sums, codes and numbers."""
    return summed_step(step, args) + grid.CPU_ELEMENTS * 96


def looked_step(step: Step, args: SumArgs) -> int:
    """Of each delta its QR, singular vectors, a copy; exponents of all sums, noise of one."""
    parts = [p for p in step.parts if isinstance(p, DeltaPart)]
    sizes = [_region_numel(step, p) for p in parts]
    factors = sum(_held(p) * 48 for p in parts)
    return summed_step(step, args) + factors + 2 * sum(sizes) + 10 * max(sizes)


def spectrum_step(step: Step, args: Any) -> int:
    """Both factors as stored, in float64, as reflections."""
    return summed_step(step, args) * 2


def factored_step(step: Step, args: FactorArgs) -> int:
    """As stored, in float64, as reflections; what is cut turned, rounded."""
    total = summed_step(step, args)
    return total + total * 3 // 4 + int(total * 2.25 * _kept_share(step, args))


def made_patch_step(step: Step, args: MakePatchArgs) -> int:
    """The packed patch, as large as the tensor at worst."""
    is_undo = args.how == "sum" and not args.gate
    return summed_step(step, args) + step.output.nbytes // (8 if is_undo else 1)


def extracted_step(step: Step, args: SubtractAndFactorArgs) -> int:
    """The differences, and the largest of what their factoring takes one after the other.

    With s the short side of a matrix, l the long one, k the largest rank and e matrices in a
    module: 4·s·l·e for Δ in float32, and if the rank is ``auto`` 2·s·l·e more for exponents and
    then 14·s·l for the noise; the factoring; and 32·k·(s + l) + 96·k² for what float16 factors
    would lose.  Factoring is Lanczos with a space of L = 10·(k + 8) directions (ten steps, of
    which most data take three), (8·s + 16·l + 32·L)·L·e; where that would fill a quarter of the
    short side, or if it must be exact, the Gram matrix, 44·s² + 24·k·(s + l), after Lanczos as
    far as it goes if the spectrum decides; at full rank the matrix itself times the identity,
    24·s·(s + l).
    """
    rows, cols = _matrix(step, args)
    count = max(1, args.experts)
    short, long = sorted((rows, cols))
    rule = args.rule or {}
    numel, rank = step.view[0] * cols * len(step.inputs) // 2, _largest_rank(step, args)
    fast = min(rank, short // 4 - 9)  # the largest that Lanczos is taken for
    is_searched = args.auto or any(v for k, v in rule.items() if k not in ("rank", "max_rank"))
    ways = [14 * short * long if args.auto else 0]
    if args.exact or fast < rank:
        ways.append(44 * short**2 + 24 * rank * (short + long))
    if not args.exact and fast > 0 and (fast == rank or is_searched):
        space = min(10 * (fast + 8), short)
        ways.append(count * space * (8 * short + 16 * long + 32 * space))
    if rank >= short:
        ways.append(24 * short * (short + long))
    made = 8 * rank * (short + long) * count
    ways.append(made + 32 * rank * (short + long) + 96 * rank**2)
    return summed_step(step, args) + (6 if args.auto else 4) * numel + max(ways)


def _held(part: DeltaPart) -> int:
    """Elements of a delta's tensors, of one expert where it is of one, and of what is drawn."""
    held = sum(s.numel for s in part.spec.fields.values()) + part.spec.row.drawn(part.spec)
    return held if part.expert is None else held // part.spec.experts


def _region_numel(step: Step, part: DeltaPart) -> int:
    """Elements of the tensor that a delta covers."""
    spans = zip((part.region.rows, part.region.cols), step.view, strict=True)
    rows, cols = (sum(map(len, axis)) or size for axis, size in spans)
    return rows * cols


def _matrix(step: Step, args: SubtractAndFactorArgs) -> tuple[int, int]:
    """Rows and columns of one matrix that a step factors: of one expert, all its parts together."""
    parts = len(args.names) if args.is_joined else 1
    return step.view[0] * parts // max(1, args.experts), step.view[1]


def _largest_rank(step: Step, args: SubtractAndFactorArgs) -> int:
    """The rank that a factoring step gives at most; 256 is taken where only data can tell."""
    rule = args.rule or {}
    caps = [c for c in (rule.get("rank"), rule.get("max_rank")) if c]
    return int(min([*_matrix(step, args), *(caps or [_UNKNOWN_RANK])]))


def _kept_share(step: Step, args: FactorArgs) -> float:
    """Ranks that truncation leaves of a delta's at most, as a share."""
    rule = args.rule or {}
    caps = [c for c in (rule.get("rank"), rule.get("max_rank")) if c]
    ranks = [p.spec.product_rank for p in step.parts if isinstance(p, DeltaPart)]
    shares = [float(c) / max(1, r) for c in caps for r in ranks]
    return min([1.0, *shares])


# --------------------------------------------- of a result, which stays until it is written


def nothing_kept(step: Step, args: Any) -> int:
    """A few numbers."""
    return 0


def factors_kept(step: Step, args: FactorArgs) -> int:
    """What the rule leaves of the old factors."""
    parts = [p for p in step.parts if isinstance(p, DeltaPart)]
    before = sum(source.nbytes for p in parts for source in p.spec.fields.values())
    return int(before * _kept_share(step, args))


def extracted_kept(step: Step, args: SubtractAndFactorArgs) -> int:
    """Factors in float32, at the largest rank."""
    matrices = args.experts or len(step.inputs) // 2
    return 4 * _largest_rank(step, args) * sum(_matrix(step, args)) * matrices


# ----------------------------------------------------------------------------- of truncations


def is_iterative(short: int, rank: int) -> bool:
    """True where a truncation runs Lanczos and not the Gram matrix (`lanczos.is_worthwhile`)."""
    return 4 * (rank + 8) < short


def truncation_bytes(rows: int, cols: int, rank: int) -> int:
    """What the best approximation of a (rows, cols) matrix takes, beyond the matrix itself.

    With s the short side and l the long one: (8·s + 16·l + 32·L)·L for a Krylov space of
    L = min(10·(rank + 8), s), or 44·s² for the Gram matrix, its eigenvectors and LAPACK's work
    space, and 24·rank·(s + l) for the factors.
    """
    short, long = sorted((rows, cols))
    if is_iterative(short, rank):
        space = min(10 * (rank + 8), short)
        return space * (8 * short + 16 * long + 32 * space)
    return 44 * short**2 + 24 * min(rank, short) * (short + long)
