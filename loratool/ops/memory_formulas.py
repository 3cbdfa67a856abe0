"""What single steps and modules take in memory: every formula, and what was measured for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from loratool.adapter import DeltaSpec, Source
from loratool.delta.forms import matrix_shape, shape_of
from loratool.dtypes import DTYPES
from loratool.engine import grid
from loratool.plan import DeltaPart, Place, Step

if TYPE_CHECKING:
    from loratool.methods import Method
    from loratool.ops.sums import SumModule

ROUNDING_BYTES = (1 << 16) * 16 * 8
"""What exact and stochastic rounding take per worker: sixteen float64 arrays of one piece."""

WORKER_BYTES = 4 << 20
"""What a thread takes that multiplies and decomposes small matrices: stack, arena, BLAS buffers."""

_UNKNOWN_RANK = 256


def worker_bytes(step: Step, chunk: int, elements: int) -> int:
    """Buffers of a worker for the pieces of a step, and what its kernel takes for a block."""
    if step.op in ("copy", "compare_bytes"):
        return chunk * len(step.inputs)
    block = grid.largest_block(step.view, elements)
    wide = max(DTYPES[s.dtype].bits // 8 for s in (*step.inputs, step.output))
    piece = max(chunk, block * wide)
    exact = step.args.get("rounding") == "exact"
    accumulator = 4 if step.output.dtype == "BF16" and not exact else 8
    rounding = ROUNDING_BYTES if step.args.get("rounding") else 0
    if "method" in step.args:
        # of each delta a block, selected, weighted, with signs and masks; of one delta at a time
        # positions and random numbers, or ranks within rows: tests/budget/test_combine_memory.py
        block_bytes = block * (len(step.parts) * 8 * (accumulator + 1) + 8 * accumulator + 110)
        return piece * (len(step.inputs) + 1) + block_bytes
    if step.op == "look_at_base":  # W, Δ and their merges in float64, with their temporaries
        return piece * (len(step.inputs) + 1) + block * 8 * 12
    return piece * (len(step.inputs) + 1) + block * (3 * accumulator + 2 * wide) + rounding


def step_bytes(step: Step) -> int:
    """Memory that a step holds from its first block to its last, beyond the workers' buffers."""
    total = 0
    for part in step.parts:
        if isinstance(part, DeltaPart):
            held = sum(s.numel for s in part.spec.fields.values())
            if part.expert is not None:
                held //= part.spec.experts
            if step.op == "look_at_base":
                total += held * 48  # its QR, singular vectors and one more copy, float64
            total += held * 16  # accumulator type, and a float64 copy while it is made
            if part.spec.reach == "all":
                total += step.view[0] * step.view[1] * 24 + 32 * min(step.view) ** 2
        elif part.rows is not None:
            total += part.source.numel * 12
    if step.op == "look_at_base":  # exponents of all sums, and the noise of one delta
        sizes = [_region_numel(step, p) for p in step.parts if isinstance(p, DeltaPart)]
        total += 2 * sum(sizes) + 10 * max(sizes)
    if step.op == "spectrum":  # both factors as stored, in float64, as reflections
        total = total * 2
    if step.op == "factor":  # as stored, in float64, as reflections; what is cut turned, rounded
        total += total * 3 // 4 + int(total * 2.25 * _kept_share(step))
    if step.op == "make_patch":  # the packed patch, as large as the tensor at worst
        is_undo = step.args["from"] == "sum" and not step.args.get("gate")
        total += step.output.nbytes // (8 if is_undo else 1)
    if step.op == "subtract_and_factor":
        total += _factoring_bytes(step)
    return total


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


def _region_numel(step: Step, part: DeltaPart) -> int:
    """Elements of the tensor that a delta covers."""
    spans = zip((part.region.rows, part.region.cols), step.view, strict=True)
    rows, cols = (sum(map(len, axis)) or size for axis, size in spans)
    return rows * cols


def _factoring_bytes(step: Step) -> int:
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
    rows, cols = _matrix(step)
    count = max(1, int(step.args.get("experts", 0)))
    short, long = sorted((rows, cols))
    is_auto, rule = bool(step.args.get("auto")), step.args["rule"]
    numel, rank = step.view[0] * cols * len(step.inputs) // 2, largest_rank(step)
    fast = min(rank, short // 4 - 9)  # the largest that Lanczos is taken for
    is_searched = is_auto or any(v for k, v in rule.items() if k not in ("rank", "max_rank"))
    ways = [14 * short * long if is_auto else 0]
    if step.args.get("exact") or fast < rank:
        ways.append(44 * short**2 + 24 * rank * (short + long))
    if not step.args.get("exact") and fast > 0 and (fast == rank or is_searched):
        space = min(10 * (fast + 8), short)
        ways.append(count * space * (8 * short + 16 * long + 32 * space))
    if rank >= short:
        ways.append(24 * short * (short + long))
    made = 8 * rank * (short + long) * count
    ways.append(made + 32 * rank * (short + long) + 96 * rank**2)
    return (6 if is_auto else 4) * numel + max(ways)


def largest_rank(step: Step) -> int:
    """The rank that a factoring step gives at most; 256 is taken where only data can tell."""
    rule = step.args["rule"]
    caps = [c for c in (rule.get("rank"), rule.get("max_rank")) if c]
    return int(min([*_matrix(step), *(caps or [_UNKNOWN_RANK])]))


def _matrix(step: Step) -> tuple[int, int]:
    """Rows and columns of one matrix that a step factors: of one expert, all its parts together."""
    experts = int(step.args.get("experts", 0))
    parts = len(step.args["names"]) if experts and "names" in step.args else 1
    return step.view[0] * parts // max(1, experts), step.view[1]


def _kept_share(step: Step) -> float:
    """Ranks that truncation leaves of a delta's at most, as a share."""
    rule = step.args.get("rule", {})
    caps = [c for c in (rule.get("rank"), rule.get("max_rank")) if c]
    ranks = [p.spec.product_rank for p in step.parts if isinstance(p, DeltaPart)]
    shares = [float(c) / max(1, r) for c in caps for r in ranks]
    return min([1.0, *shares])


def made_bytes(step: Step) -> int:
    """Factors of a step, which stay in memory until they are written."""
    if step.op == "factor":
        parts = [p for p in step.parts if isinstance(p, DeltaPart)]
        before = sum(source.nbytes for p in parts for source in p.spec.fields.values())
        return int(before * _kept_share(step))
    if step.op != "subtract_and_factor":
        return 0
    matrices = int(step.args.get("experts", 0)) or len(step.inputs) // 2
    return 4 * largest_rank(step) * sum(_matrix(step)) * matrices


def combined_bytes(module: SumModule, rank: int, method: Method) -> int:
    """Memory that one module takes at work, measured in tests/budget/test_combine_memory.py.

    F = 8·R·(out + in) bytes are all factors in float64, of all experts.  At most 7 F are there at
    once: loaded, scaled, stacked, orthogonal, and the result as computed and as stored; and the
    R×R cores.
    Element-wise methods have ΔW in float32 and, one after the other, blocks of E elements (values,
    weighted values, signs and masks of T adapters, 48 bytes each; positions and random numbers of
    one, 110) and the truncation.  ``knots-ties`` has such blocks of float64.
    """
    if module.is_bias:
        return 64 * module.shape[0] * len(module.terms)
    (rows, cols), count = module.shape, len(module.terms)
    factors = 8 * module.rank * (rows + cols) * max(1, module.spec.experts)
    total = WORKER_BYTES + 7 * factors + 32 * module.rank**2 * (count + 4)
    if method.space == "joint":
        return total + max(1 << 18, cols * count) * 90
    if method.space != "dense":
        return total
    blocks = max(1 << 19, cols) * (48 * count + 110)
    return total + 4 * rows * cols + max(blocks, truncation_bytes(rows, cols, rank))


def mixed_bytes(sources: Sequence[Source]) -> int:
    """Averaging tensors: the sum, one as stored and one in float64, with its product."""
    return 32 * max(s.numel for s in sources)


def factor_bytes(spec: DeltaSpec) -> int:
    """Both factors of all experts in float64, block-diagonal ones laid out; or a bias."""
    if not spec.is_matrix:
        return 8 * shape_of(spec)[0]
    return 8 * spec.product_rank * sum(matrix_shape(spec)) * max(1, spec.experts)


def compared_bytes(specs: Sequence[DeltaSpec]) -> int:
    """Memory that comparing one module of several adapters takes; F are all their factors.

    At most 5 F: scaled, decomposed (U and V are as large), and what a difference of two takes; and
    for signs 60 bytes per element that is looked at.
    """
    total = WORKER_BYTES + 5 * sum(map(factor_bytes, specs)) + _square_bytes(specs)
    return total + (60 * sampled_elements(specs[0]) if len(specs) == 2 else 0)


def measured_bytes(spec: DeltaSpec) -> int:
    """Memory that statistics of one module take: 4 F, and 60 bytes per element of the kurtosis."""
    elements = 60 * sampled_elements(spec)
    return WORKER_BYTES + 4 * factor_bytes(spec) + _square_bytes([spec]) + elements


def rescaled_bytes(spec: DeltaSpec) -> int:
    """Memory that scaling one module takes, 6 F: exact, as stored, their difference, one QR."""
    return WORKER_BYTES + 6 * factor_bytes(spec) + _square_bytes([spec])


def intruder_bytes(part: DeltaPart, base: Source) -> int:
    """Memory that looking for intruders in one matrix takes: 9 copies of it in float64.

    And 12 of the shorter side squared, where that is decomposed; and the tensor that holds it.
    """
    rows, cols = matrix_shape(part.spec)
    at_work = 72 * rows * cols + 96 * min(rows, cols) ** 2
    return WORKER_BYTES + base.nbytes + at_work + factor_bytes(part.spec)


def detached_bytes(places: Sequence[Place]) -> int:
    """Memory that taking a change apart from its base takes: the weight, its parts, factors.

    For PiSSA and its kin the decomposition of the weight: 24 bytes per element, and 32 of the
    shorter side squared; else a block of a million elements in float64.
    """
    spec = places[0].part.spec
    rows, cols = matrix_shape(spec)
    whole = sum(place.source.nbytes for place in places) + 8 * rows * cols
    at_work = 24 * rows * cols + 32 * min(rows, cols) ** 2 if spec.reach == "all" else 3 << 23
    return WORKER_BYTES + whole + at_work + 8 * factor_bytes(spec)


def sampled_elements(spec: DeltaSpec) -> int:
    """Elements of a module that are looked at one by one (whole rows, one at least)."""
    if not spec.is_matrix:
        return shape_of(spec)[0]
    rows, cols = matrix_shape(spec)
    matrices = max(1, spec.experts)
    return matrices * min(rows * cols, max(cols, grid.SAMPLE_ELEMENTS // matrices))


def _square_bytes(specs: Sequence[DeltaSpec]) -> int:
    """The r×r cores of products, and LAPACK's work space for their SVD."""
    return sum(150 * spec.product_rank**2 for spec in specs)
