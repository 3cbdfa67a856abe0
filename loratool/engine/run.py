"""The one loop that touches tensor bytes: read a chunk, run the kernel on its blocks, write it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from loratool.adapter import Source, TensorData
from loratool.dtypes import DTYPES
from loratool.engine import grid
from loratool.engine.buffers import ByteBuffer, Scratch, from_bytes
from loratool.engine.kernel import Env, Kernel
from loratool.engine.kernels import KERNELS
from loratool.engine.machine import default_threads
from loratool.engine.reads import cut_step, planned_ranges
from loratool.engine.sink import CheckpointSink
from loratool.engine.workers import run_workers
from loratool.plan import Plan, Step
from loratool.store.reader import FileReader, most_open_files
from loratool.store.shard_writer import PAGE

_CPU = torch.device("cpu")

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class RunOptions:
    """How to run a plan; none of it changes the bytes written.

    Attributes:
        device: where kernels run.
        threads: workers.
        chunk_bytes: bytes per piece of input; None = the device's default.
        sample: only a few blocks of each changed tensor, nothing written (``--dry-run``).
        progress: called with (bytes done, bytes in all).
        block_elements: block size of the grid; None = the device's.  Only digests and sums that
            are not exact depend on it.
        allow_nonfinite: NaN and infinity in inputs pass and are counted.
    """

    device: torch.device = _CPU
    threads: int | None = None
    chunk_bytes: int | None = None
    sample: bool = False
    progress: Progress | None = None
    block_elements: int | None = None
    allow_nonfinite: bool = False

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
    return _Run(plan, reader, sink, options, take).execute()


class _Job:
    """A step at work: its kernel, and how many of its chunks are still to come."""

    def __init__(self, index: int, step: Step, kernel: Kernel | None, chunks: int) -> None:
        self.index = index
        self.step = step
        self.kernel = kernel
        self.left = chunks
        self.lock = threading.Lock()
        self.is_ready = False


class _Run:
    def __init__(
        self,
        plan: Plan,
        reader: FileReader,
        sink: CheckpointSink | None,
        options: RunOptions,
        take: Callable[[Any], Any] | None,
    ) -> None:
        self.take = take
        self.plan = plan
        self.sink = sink
        self.options = options
        self.env = Env(reader, options.device, options.elements, Scratch(), options.allow_nonfinite)
        self.results: dict[int, Any] = {}
        self.carried: list[Any] = []
        self._tasks: Iterator[tuple[_Job, list[grid.Block]]] = iter(())
        self._lock = threading.RLock()  # tasks are made, and may finish, under it
        self._done_bytes = 0
        self._total_bytes = max(1, plan.read_bytes)

    def execute(self) -> list[Any]:
        self._tasks = self._make_tasks()
        release = None if self.sink is None else self.sink.close
        # Each worker writes one shard, which takes two descriptors, and more to complete it.
        count = min(self.options.threads or default_threads(), max(1, most_open_files() // 2))
        run_workers(count, self._work, release)
        return self.carried + [self.results[i] for i in sorted(self.results)]

    def _make_tasks(self) -> Iterator[tuple[_Job, list[grid.Block]]]:
        skipped: dict[int, bool] = {}
        for index, step in enumerate(self.plan.steps):
            if self.sink is not None and not self.options.sample:
                if step.shard not in skipped:
                    skipped[step.shard] = self._take_over(step)
                if skipped[step.shard]:
                    self._advance(sum(i.nbytes for i in step.inputs))
                    continue
            pieces = cut_step(
                step, elements=self.options.elements, chunk=self.options.chunk,
                sample=self.options.sample,
            )  # fmt: skip
            if self.options.sample and not pieces:
                continue
            maker = KERNELS.get(step.op)
            job = _Job(index, step, maker(step, self.env) if maker else None, len(pieces))
            if not pieces:
                self._finish(job)
            for piece in pieces:
                yield job, piece

    def _take_over(self, step: Step) -> bool:
        assert self.sink is not None
        earlier = self.sink.finished_results(step.shard)
        if earlier is not None:
            self.carried.extend(earlier)
            return True
        return self.sink.clone(step, self.env.reader)

    def _work(self, stop: threading.Event) -> None:
        worker = _Worker(self)
        while not stop.is_set():
            with self._lock:
                task = next(self._tasks, None)
            if task is None:
                return
            self._run_task(worker, *task)

    def _run_task(self, worker: _Worker, job: _Job, piece: list[grid.Block]) -> None:
        with job.lock:
            if not job.is_ready:
                worker.prepare(job)
                job.is_ready = True
        worker.process(job, piece)
        with job.lock:
            job.left -= 1
            is_last = job.left == 0
        if is_last:
            self._finish(job)

    def _finish(self, job: _Job) -> None:
        result = job.kernel.finish() if job.kernel is not None else None
        job.kernel = None
        if result is not None and self.take is not None:
            result = self.take(result)
        if result is not None:
            with self._lock:
                self.results[job.index] = result
        if self.sink is not None and not self.options.sample:
            self.sink.step_done(job.step, result)

    def _advance(self, nbytes: int) -> None:
        self._done_bytes += nbytes
        if self.options.progress is not None:
            self.options.progress(min(self._done_bytes, self._total_bytes), self._total_bytes)

    def advance(self, nbytes: int) -> None:
        """Count bytes read."""
        with self._lock:
            self._advance(nbytes)


class _Worker:
    """One thread's buffers, and on a GPU its stream."""

    def __init__(self, run: _Run) -> None:
        self._run = run
        self._device = run.options.device
        self._is_cuda = self._device.type == "cuda"
        self._stream = torch.cuda.Stream(self._device) if self._is_cuda else None  # type: ignore[no-untyped-call]
        self._inputs: list[ByteBuffer] = []
        self._output = ByteBuffer(pinned=self._is_cuda)

    def prepare(self, job: _Job) -> None:
        """Load what the job's kernel needs; other workers' streams must see it complete."""
        if job.kernel is None:
            return
        with torch.cuda.stream(self._stream):
            job.kernel.prepare()
            if self._stream is not None:
                self._stream.synchronize()

    def process(self, job: _Job, piece: list[grid.Block]) -> None:
        """Read a piece of every input, run the kernel on its blocks, write the result."""
        if job.kernel is None:
            self._copy(job.step, piece)
            return
        with torch.cuda.stream(self._stream):
            self._compute(job, job.kernel, piece)

    def _copy(self, step: Step, piece: list[grid.Block]) -> None:
        size = sum(b.numel for b in piece)
        target, pad = self._target(step, piece[0].start)
        data, _ = self._output.take(size, pad)
        source = step.inputs[0]
        if isinstance(source, TensorData):
            data[:] = memoryview(source.data).cast("B")[piece[0].start : piece[0].start + size]
        else:
            self._run.env.reader.read_into(source, piece[0].start, data)
        assert self._run.sink is not None
        self._run.sink.put(step, target, data, aligned=True)
        self._run.advance(size)

    def _compute(self, job: _Job, kernel: Kernel, piece: list[grid.Block]) -> None:
        step = job.step
        first, count = piece[0].start, sum(b.numel for b in piece)
        sources = step.inputs
        if "names" in step.args:  # pairs, one after the other through the same buffers
            sources = sources[2 * piece[0].pair : 2 * piece[0].pair + 2]
        inputs = [self._read(i, s, step, first, count) for i, s in enumerate(sources)]
        writes = self._run.sink is not None and not self._run.options.sample
        outs: torch.Tensor | None = None
        if writes:
            size = DTYPES[step.output.dtype].bits // 8
            target, pad = self._target(step, first * size)
            aligned = pad % size == 0
            data, raw = self._output.take(count * size, pad if aligned else 0)
            host = from_bytes(raw, step.output.dtype, (count,))
            outs = torch.empty_like(host, device=self._device) if self._is_cuda else host
        for block in piece:
            at = slice(block.start - first, block.start - first + block.numel)
            shape = (block.r1 - block.r0, block.c1 - block.c0)
            blocks = [i[at].view(shape) for i in inputs]
            kernel.run(block, blocks, None if outs is None else outs[at].view(shape))
        if outs is not None and self._is_cuda:
            host.copy_(outs, non_blocking=True)
        if self._stream is not None:
            self._stream.synchronize()
        if outs is not None:
            assert self._run.sink is not None
            self._run.sink.put(step, target, data, aligned)
        self._run.advance(sum(i.element_size() * count for i in inputs))

    def _target(self, step: Step, inside: int) -> tuple[int, int]:
        assert self._run.sink is not None
        offset = self._run.sink.offset(step) + inside
        return offset, offset % PAGE

    def _read(
        self, position: int, source: Source, step: Step, first: int, count: int
    ) -> torch.Tensor:
        dtype = "U8" if step.op == "compare_bytes" else source.dtype
        size = DTYPES[dtype].bits // 8
        while len(self._inputs) <= position:
            self._inputs.append(ByteBuffer(pinned=self._is_cuda))
        data, raw = self._inputs[position].take(count * size)
        if isinstance(source, TensorData):
            data[:] = memoryview(source.data).cast("B")[first * size : (first + count) * size]
        else:
            self._run.env.reader.read_into(source, first * size, data)
        host = from_bytes(raw, dtype, (count,))
        return host.to(self._device, non_blocking=True) if self._is_cuda else host
