"""How much memory a plan will take, known before it starts."""

from __future__ import annotations

from dataclasses import dataclass

from loratool.dtypes import DTYPES
from loratool.engine import grid
from loratool.errors import DiskError
from loratool.plan import DeltaPart, Plan, Step

TORCH_BYTES = {"cpu": 260_000_000, "cuda": 1_200_000_000}
"""Resident size of an interpreter with torch (CPU build; with a CUDA context)."""

ROUNDING_BYTES = (1 << 16) * 16 * 8
"""What exact and stochastic rounding take per worker: sixteen float64 arrays of one piece."""

WORKER_BYTES = 4 << 20
"""What a thread takes that multiplies and decomposes small matrices: stack, arena, BLAS buffers."""

MIN_CHUNK = 1 << 20

_UNKNOWN_RANK = 256

_KEPT_FREE = 1.2
"""The allocator keeps some of what was freed: 5 to 18 % of the rest, measured."""


@dataclass(frozen=True)
class MemoryPlan:
    """Threads and buffers that keep a plan under a limit.

    Attributes:
        threads: workers.
        chunk_bytes: bytes per piece of input.
        peak_bytes: planned peak resident size.
    """

    threads: int
    chunk_bytes: int
    peak_bytes: int


def plan_memory(
    plan: Plan, *, device: str, threads: int, chunk_bytes: int | None, limit: int | None
) -> MemoryPlan:
    """Choose threads and buffer sizes under a limit.

    Args:
        plan: what will run.
        device: ``cpu`` or ``cuda``.
        threads: workers wished for.
        chunk_bytes: bytes per piece; None = the device's default.
        limit: bytes that may be used; None = no limit known.

    Raises:
        DiskError: the plan does not fit even with one worker and small buffers.
    """
    default = grid.CUDA_CHUNK_BYTES if device == "cuda" else grid.CPU_CHUNK_BYTES
    chunk = chunk_bytes or default
    found = MemoryPlan(threads, chunk, _peak(plan, device, threads, chunk))
    while limit is not None and found.peak_bytes > limit:
        if found.threads > 1:
            found = MemoryPlan(found.threads - 1, chunk, 0)
        elif found.chunk_bytes > MIN_CHUNK:
            found = MemoryPlan(1, found.chunk_bytes // 2, 0)
        else:
            raise DiskError(
                "LT-605",
                "the plan needs more memory than there is",
                expected=f"{found.peak_bytes / 1e6:.0f} MB",
                got=f"{limit / 1e6:.0f} MB",
                hint="raise --max-memory, or use a machine with more memory",
            )
        peak = _peak(plan, device, found.threads, found.chunk_bytes)
        found = MemoryPlan(found.threads, found.chunk_bytes, peak)
    return found


def _peak(plan: Plan, device: str, threads: int, chunk: int) -> int:
    elements = grid.CUDA_ELEMENTS if device == "cuda" else grid.CPU_ELEMENTS
    workers = sorted((_worker_bytes(s, chunk, elements) for s in plan.steps), reverse=True)
    on_host = [s for s in plan.steps if device == "cpu" or s.op != "subtract_and_factor"]
    steps = sorted((step_bytes(s) for s in on_host), reverse=True)
    kept = sum(map(_made_bytes, plan.steps))
    # A worker finishes a step before it begins another one.
    used = sum(workers[:1]) * threads + sum(steps[:threads])
    return TORCH_BYTES[device] + int(used * _KEPT_FREE) + kept


def _worker_bytes(step: Step, chunk: int, elements: int) -> int:
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
            if part.spec.base_change:
                total += step.view[0] * step.view[1] * 24 + 32 * min(step.view) ** 2
        elif part.rows is not None:
            total += part.source.numel * 12
    if step.op == "look_at_base":  # exponents of all sums, and the noise of one delta
        sizes = [_region_numel(step, p) for p in step.parts if isinstance(p, DeltaPart)]
        total += 2 * sum(sizes) + 10 * max(sizes)
    if step.op == "spectrum":  # both factors as stored, in float64, and their triangles
        total = total * 3 // 2
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
    ranks = [p.spec.rank for p in step.parts if isinstance(p, DeltaPart)]
    shares = [float(c) / max(1, r) for c in caps for r in ranks]
    return min([1.0, *shares])


def _made_bytes(step: Step) -> int:
    """Factors of a step, which stay in memory until they are written."""
    if step.op == "factor":
        parts = [p for p in step.parts if isinstance(p, DeltaPart)]
        before = sum(source.nbytes for p in parts for source in p.spec.fields.values())
        return int(before * _kept_share(step))
    if step.op != "subtract_and_factor":
        return 0
    matrices = int(step.args.get("experts", 0)) or len(step.inputs) // 2
    return 4 * largest_rank(step) * sum(_matrix(step)) * matrices
