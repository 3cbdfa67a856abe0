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
    kept = sum(
        source.nbytes
        for step in plan.steps
        if step.op == "factor"
        for part in step.parts
        if isinstance(part, DeltaPart)
        for source in part.spec.fields.values()
    )  # new factors stay in memory until they are written, none larger than the old ones
    return TORCH_BYTES[device] + sum(workers[:1]) * threads + sum(steps[: threads + 1]) + kept


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
        # positions and random numbers, or ranks within rows; half as much again for what the
        # allocator keeps: tests/budget/test_combine_memory.py
        block_bytes = block * (len(step.parts) * 12 * (accumulator + 1) + 8 * accumulator + 110)
        return piece * (len(step.inputs) + 1) + block_bytes
    if step.op == "look_at_base":  # W and the spacings in float64, with their temporaries
        return piece * (len(step.inputs) + 1) + block * 8 * 6
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
    if step.op in ("factor", "spectrum"):
        total *= 4  # both factors as stored, in float64, as reflections, turned, and what is cut
    if step.op in ("make_patch", "restore"):  # the packed patch, as large as the tensor at worst
        total += step.output.nbytes // (1 if step.args["from"] != "sum" else 8)
    if step.op == "subtract_and_factor":
        total += _factoring_bytes(step)
    if step.op in ("residual_of_sum", "residual_of_copy"):
        total += step.output.numel + step.output.nbytes  # its patch, should nothing compress
    return total


def is_iterative(short: int, rank: int) -> bool:
    """True where a truncation runs Lanczos and not the Gram matrix (`lanczos.is_worthwhile`)."""
    return 4 * (rank + 8) < short


def truncation_bytes(rows: int, cols: int, rank: int) -> int:
    """What the best approximation of a (rows, cols) matrix takes, beyond the matrix itself.

    With s the short side and l the long one: 24·L·(s + l) for a Krylov space of
    L = min(10·(rank + 8), s), or 40·s² for the Gram matrix, its eigenvectors and LAPACK's work
    space, and 24·rank·(s + l) for the factors.
    """
    short, long = sorted((rows, cols))
    if is_iterative(short, rank):
        return 24 * min(10 * (rank + 8), short) * (short + long)
    return 40 * short**2 + 24 * min(rank, short) * (short + long)


def _factoring_bytes(step: Step) -> int:
    """The difference in float32, and the larger of the ways to factor it.

    With s the short side, l the long one and k the largest rank: 4·rows·cols for Δ; 2·rows·cols
    for the exponents and 10·rows·cols of one matrix for the noise if the rank is ``auto``;
    Lanczos 24·L·(s + l) + 40·L² with L = min(10·(k + 8), s), the Gram matrix 40·s² + 24·k·(s + l),
    or the matrix itself times the identity 20·s·l.
    """
    rows, cols = step.view
    experts = max(1, int(step.args.get("experts", 0)))
    count = len(step.inputs) // 2 * experts
    short, long = sorted((rows // experts, cols))
    rule = step.args["rule"]
    caps: list[int] = [c for c in (rule.get("rank"), rule.get("max_rank")) if c]
    if step.args.get("auto") and not rule.get("max_rank"):
        caps.append(257)
    rank = min([short, *caps])
    total = 4 * rows * cols * len(step.inputs) // 2
    if step.args.get("auto"):
        total += rows * cols * len(step.inputs) + 10 * short * long
    space = min(10 * (rank + 8), short)
    lanczos = 24 * space * (short + long) + 40 * space**2
    gram = 40 * short**2 + 24 * rank * (short + long)
    return int(total) + max(lanczos * count, gram, 20 * short * long if rank >= short else 0)
