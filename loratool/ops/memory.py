"""How much memory a command will take, known before it starts.

What a step takes is in `loratool.engine.step_memory`, a module in `loratool.engine.module_memory`;
here it is added up, workers and buffers are chosen under the limit, and what cannot fit is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from loratool.engine import grid
from loratool.engine.machine import can_fork
from loratool.engine.rows import op_of, piece_bytes, result_bytes, step_bytes
from loratool.errors import DiskError
from loratool.frozen import Frozen
from loratool.plan import Plan, Step
from loratool.report.text import format_bytes

TORCH_BYTES = {"cpu": 260_000_000, "cuda": 1_200_000_000}
"""Resident size of an interpreter with torch (CPU build; with a CUDA context)."""

COPY_BYTES = 30_000_000
"""What a copy of this process (fork) has for itself before it does anything."""

MIN_CHUNK = 1 << 20

_KEPT_FREE = 1.2
"""The allocator keeps some of what was freed: 5 to 18 % of the rest, measured."""


class MemoryPlan(Frozen):
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
    plan: Plan, *, device: str, threads: int, chunk_bytes: int | None, limit: int | None,
    executor: str = "threads",
) -> MemoryPlan:  # fmt: skip
    """Choose threads and buffer sizes for the steps of a plan.

    Args:
        plan: what will run.
        device: ``cpu`` or ``cuda``.
        threads: workers wished for.
        chunk_bytes: bytes per piece; None = the device's default.
        limit: bytes that may be used; None = no limit known.
        executor: workers that are no threads have interpreters of their own.

    Raises:
        DiskError: LT-605, it does not fit even with one worker and small buffers.
    """
    default = grid.CUDA_CHUNK_BYTES if device == "cuda" else grid.CPU_CHUNK_BYTES
    needs = _Needs(plan, device, executor)
    chunk = chunk_bytes or default
    found = MemoryPlan(threads, chunk, needs.peak(threads, chunk))
    while limit is not None and found.peak_bytes > limit:
        if found.threads > 1:
            threads -= 1
        elif chunk > MIN_CHUNK:
            chunk //= 2
        else:
            raise _too_much(found.peak_bytes, limit)
        found = MemoryPlan(threads, chunk, needs.peak(threads, chunk))
    return found


def plan_modules(
    needs: Iterable[int], *, kept: int, threads: int, limit: int | None, hint: str = "",
    executor: str = "threads",
) -> MemoryPlan:  # fmt: skip
    """Choose the workers of a command that takes one module after the other.

    Args:
        needs: bytes that each module takes while it is at work.
        kept: bytes of the results that stay in memory.
        threads: workers wished for.
        limit: bytes that may be used; None = no limit known.
        hint: another way out than more memory.
        executor: as of `plan_memory`.

    Raises:
        DiskError: LT-605, the largest module does not fit.
    """
    sizes = sorted(needs, reverse=True)
    for workers in range(max(1, min(threads, len(sizes))), 0, -1):
        used = grid.CPU_CHUNK_BYTES + kept + sum(sizes[:workers])
        peak = _interpreters("cpu", workers, executor) + used
        if limit is None or peak <= limit:
            return MemoryPlan(workers, 0, peak)
    assert limit is not None
    raise _too_much(peak, limit, hint)


def _too_much(peak: int, limit: int, hint: str = "") -> DiskError:
    return DiskError(
        "LT-605", "the plan needs more memory than there is", expected=format_bytes(peak),
        got=format_bytes(limit),
        hint=f"--max-memory {math.ceil(peak / 1e6)}MB, or {hint or 'a machine with more memory'}",
    )  # fmt: skip


class _Needs:
    """What the steps of a plan take."""

    def __init__(self, plan: Plan, device: str, executor: str) -> None:
        self._plan, self._device, self._executor = plan, device, executor
        self._elements = grid.CUDA_ELEMENTS if device == "cuda" else grid.CPU_ELEMENTS
        on_host = [s for s in plan.steps if device == "cpu" or not op_of(s).is_arithmetic]
        self._steps = sorted(map(step_bytes, on_host), reverse=True)
        self._kept = sum(map(result_bytes, plan.steps))
        self._pieces: dict[int, int] = {}

    def peak(self, threads: int, chunk: int) -> int:
        """Bytes at most, the interpreter included."""
        # A worker finishes a step before it begins another one.
        used = self._largest_piece(chunk) * threads + sum(self._steps[:threads])
        interpreters = _interpreters(self._device, threads, self._executor)
        return interpreters + int(used * _KEPT_FREE) + self._kept

    def _largest_piece(self, chunk: int) -> int:
        if chunk not in self._pieces:
            self._pieces[chunk] = max((self._piece(s, chunk) for s in self._plan.steps), default=0)
        return self._pieces[chunk]

    def _piece(self, step: Step, chunk: int) -> int:
        if self._device == "cuda" and op_of(step).is_arithmetic:  # what is on its way there
            return 2 * grid.FERRY_BYTES
        return piece_bytes(step, chunk, self._elements)


def _interpreters(device: str, workers: int, executor: str) -> int:
    """With torch in each; copies of a process share it."""
    if executor == "processes" and can_fork():
        return TORCH_BYTES[device] + COPY_BYTES * workers
    return TORCH_BYTES[device] * (1 if executor == "threads" else 1 + workers)
