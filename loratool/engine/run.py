"""What a run has to do, and what becomes of the results; executors do it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch

from loratool.engine import grid
from loratool.engine.executors import Task, find_executor
from loratool.engine.kernel import Env
from loratool.engine.machine import default_threads
from loratool.engine.reads import planned_ranges, sampled_bytes, sampled_steps
from loratool.engine.sink import CheckpointSink
from loratool.engine.step import Result
from loratool.frozen import Frozen
from loratool.plan import DeltaPart, Plan, Step
from loratool.store.reader import FileReader, most_open_files

_CPU = torch.device("cpu")

Progress = Callable[[int, int], None]


class RunOptions(Frozen):
    """How to run a plan; none of it changes the bytes written.

    Attributes:
        device: where kernels run.
        others: more GPUs of the same model, which do steps of their own.
        threads: workers.
        chunk_bytes: bytes per piece of input; None = the device's default.
        sample: only a few blocks of each changed tensor, nothing written (``--dry-run``).
        progress: called with (bytes done, bytes in all).
        on_work: called with the name of a tensor, or of a shard taken over, before it is begun.
        block_elements: block size of the grid; None = the device's.  Only digests and sums that
            are not exact depend on it.
        allow_nonfinite: NaN and infinity in inputs pass and are counted.
        executor: who does it, see `loratool.engine.executors` (a script that asks for
            ``processes`` needs ``if __name__ == "__main__":``, as `multiprocessing` has it).
        address: of a cluster.
    """

    device: torch.device = _CPU
    threads: int | None = None
    chunk_bytes: int | None = None
    sample: bool = False
    progress: Progress | None = None
    on_work: Callable[[str], None] | None = None
    block_elements: int | None = None
    allow_nonfinite: bool = False
    executor: str = "threads"
    address: str | None = None
    others: tuple[torch.device, ...] = ()

    @property
    def elements(self) -> int:
        """Block size of the grid."""
        if self.block_elements is not None:
            return self.block_elements
        return grid.CUDA_ELEMENTS if self.device.type == "cuda" else grid.CPU_ELEMENTS

    @property
    def chunk(self) -> int:
        """Bytes per piece."""
        default = grid.CUDA_CHUNK_BYTES if self.device.type == "cuda" else grid.CPU_CHUNK_BYTES
        return self.chunk_bytes or default

    def env(self, reader: FileReader) -> Env:
        """What the steps of a run share."""
        return Env(
            reader, self.device, self.elements, allow_nonfinite=self.allow_nonfinite,
            chunk=self.chunk, sample=self.sample, others=self.others,
        )  # fmt: skip


def execute(
    plan: Plan,
    reader: FileReader,
    sink: CheckpointSink | None,
    options: RunOptions,
    take: Callable[[Any], Any] | None = None,
) -> list[Any]:
    """Run every step of a plan.

    Args:
        plan: what to do.
        reader: input files.
        sink: where streamed tensors go; None for plans that only measure or fill an adapter.
        options: how.
        take: called with each result, from any thread; what it returns is kept instead.

    Returns:
        Results of the steps that have one, in plan order (results of shards that an earlier run
        completed come as the dictionaries in its journal).
    """
    reader.expect(planned_ranges(plan, elements=options.elements, sample=options.sample))
    run = _Run(plan, reader, None if options.sample else sink, options, take)
    # Each worker writes one shard, which takes two descriptors, and more to complete it.
    count = min(options.threads or default_threads(), max(1, most_open_files() // 2))
    find_executor(options.executor, options.address)(run.env, run.tasks(), run, count)
    return run.carried + [run.results[i] for i in sorted(run.results)]


def _factor_bytes(step: Step) -> int:
    """What a step reads that streams nothing: the factors of its module."""
    parts = () if step.inputs else step.parts
    specs = [part.spec for part in parts if isinstance(part, DeltaPart)]
    return sum(source.nbytes for spec in specs for source in spec.fields.values())


def in_turn(shards: Sequence[int], width: int) -> Iterator[int]:
    """Positions of steps, from ``width`` shards in turn; with 1 one shard after the other.

    Args:
        shards: of each step.
        width: how many shards at once.
    """
    queues: dict[int, deque[int]] = {}
    for position, shard in enumerate(shards):
        queues.setdefault(shard, deque()).append(position)
    waiting = iter(queues.values())
    active = deque(islice(waiting, width))
    while active:
        queue = active.popleft()
        yield queue.popleft()
        active.extend([queue] if queue else islice(waiting, 1))


class _Run:
    """The desk of a run: what is left to do, results, the sink, progress."""

    def __init__(
        self,
        plan: Plan,
        reader: FileReader,
        sink: CheckpointSink | None,
        options: RunOptions,
        take: Callable[[Any], Any] | None,
    ) -> None:
        self.env = options.env(reader)
        self.results: dict[int, Any] = {}
        self.carried: list[Any] = []
        self._plan, self._sink, self._take = plan, sink, take
        self._progress, self._on_work = options.progress, options.on_work
        self._lock = threading.RLock()
        elements = options.elements
        total = sampled_bytes(plan, elements=elements) if options.sample else plan.read_bytes
        total += sum(map(_factor_bytes, plan.steps))
        self._done_bytes, self._total_bytes = 0, max(1, total)

    def tasks(self) -> Iterator[Task]:
        """Steps that no earlier run has done, shard by shard."""
        skipped: dict[int, bool] = {}
        if self._sink is None:
            steps = self._plan.steps
            chosen = sampled_steps(self._plan) if self.env.sample else range(len(steps))
            for index in chosen:
                self._begin(steps[index].output.name)
                yield Task(index, steps[index], None)
            return
        for index in in_turn([s.shard for s in self._plan.steps], self._sink.files_at_once):
            step = self._plan.steps[index]
            if step.shard not in skipped:
                self._begin(self._plan.shards[step.shard].name)
                skipped[step.shard] = self._take_over(step, self._sink)
            if skipped[step.shard]:
                self.advance(sum(i.nbytes for i in step.inputs))
            else:
                self._begin(step.output.name)
                yield Task(index, step, self._sink.out(step))

    def _begin(self, name: str) -> None:
        if self._on_work is not None:
            self._on_work(name)

    def _take_over(self, step: Step, sink: CheckpointSink) -> bool:
        earlier = sink.finished_results(step.shard)
        if earlier is not None:
            self.carried.extend(earlier)
            return True
        return sink.clone(step, self.env.reader)

    def done(self, task: Task, result: Result) -> None:
        """Take a finished step in; the last one of a shard completes it."""
        value = result.value
        if value is not None and self._take is not None:
            value = self._take(value)
        if value is not None:
            with self._lock:
                self.results[task.index] = value
        if self._sink is not None:
            self._sink.step_done(task.step, value, result.pieces, result.made)
        if not task.step.inputs:
            self.advance(_factor_bytes(task.step))

    def advance(self, nbytes: int) -> None:
        """Count bytes read."""
        with self._lock:
            self._done_bytes += nbytes
            if self._progress is not None:
                self._progress(min(self._done_bytes, self._total_bytes), self._total_bytes)

    def release(self) -> None:
        """Let go of open files."""
        if self._sink is not None:
            self._sink.close()
