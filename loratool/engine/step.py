"""One step at work: read a piece of every input, run the kernel on its blocks, write the result.

`run_step` does a whole step by itself; an executor that shares the pieces of a step between
threads uses `StepWork` and one `Lane` per thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch

from loratool.adapter import Source, TensorData
from loratool.dtypes import DTYPES
from loratool.engine import grid
from loratool.engine.buffers import ByteBuffer, torch_dtype
from loratool.engine.device import load_solvers
from loratool.engine.kernel import Env, Kernel
from loratool.engine.reads import cut_step
from loratool.engine.rows import Op, op_of
from loratool.engine.workers import Crew
from loratool.frozen import Frozen
from loratool.plan import Step
from loratool.plugins import function_of
from loratool.store.checksum import Piece
from loratool.store.far_file import Made
from loratool.store.shard_writer import PAGE


class Out(Protocol):
    """Where the bytes of a step's tensor go.

    Attributes:
        start: where the tensor begins in its file.
    """

    start: int

    def put(self, offset: int, data: memoryview, aligned: bool) -> None:
        """Write at an absolute offset of the file, see `ShardWriter.put`."""

    def pieces(self) -> Sequence[Piece]:
        """Checksums that only this object knows."""


class Nowhere:
    """An `Out` that drops what it is given: for trials of a kernel."""

    start = 0

    def put(self, offset: int, data: memoryview, aligned: bool) -> None:
        """Nothing."""

    def pieces(self) -> tuple[Piece, ...]:
        """None."""
        return ()


class Result(Frozen):
    """What a step gives.

    Attributes:
        value: the kernel's result.
        pieces: checksums of what was written; () where the file's own writer has taken them.
        read: bytes of input that were read.
        made: the whole shard that the step is of, where its worker made that.
    """

    value: Any
    pieces: tuple[Piece, ...] = ()
    read: int = 0
    made: Made | None = None


def run_step(step: Step, env: Env, out: Out | None = None) -> Result:
    """Do a step from its first block to its last.  Steps, results and `env` can be pickled.

    Args:
        step: of any plan.
        env: where it runs.
        out: where its tensor goes; None if nothing is written.
    """
    work, lane = StepWork(step, env, out), Lane(env.device)
    read = sum(work.process(lane, piece) for piece in work.pieces)
    return Result(work.finish(lane), tuple(out.pieces()) if out is not None else (), read)


class Lane:
    """One thread's buffers, and on a GPU its stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_cuda = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if self.is_cuda else None  # type: ignore[no-untyped-call]
        self.output = ByteBuffer(pinned=self.is_cuda)
        self._inputs: list[ByteBuffer] = []
        self._ferries = [Ferry(), Ferry()] if self.is_cuda else []

    def at_work(self) -> AbstractContextManager[Any]:
        """Its stream is the current one; a lane of the CPU never wakes a GPU up."""
        if self.stream is None:
            return nullcontext()
        return torch.cuda.stream(self.stream)

    def load(
        self, position: int, nbytes: int, dtype: str, fill: Callable[[int, memoryview], None]
    ) -> torch.Tensor:
        """Bytes of an input as flat elements on the device; valid until the input is loaded again.

        On the way to a GPU they pass through page-locked buffers: one is filled while the other
        is copied, where the GPU is not waited for in between.

        Args:
            position: of the input.
            nbytes: how many.
            dtype: what they are.
            fill: puts the bytes from an offset on into a buffer.
        """
        if not self.is_cuda:
            while len(self._inputs) <= position:
                self._inputs.append(ByteBuffer())
            data, here = self._inputs[position].take(nbytes, 0, dtype)
            fill(0, data)
            return here
        there = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        for start in range(0, nbytes, grid.FERRY_BYTES):
            ferry = next((f for f in self._ferries if f.is_here()), self._ferries[0])
            ferry.carry(there[start : start + grid.FERRY_BYTES], partial(fill, start))
        return there.view(torch_dtype(dtype))


class Ferry:
    """Page-locked memory by which bytes come to a GPU."""

    def __init__(self) -> None:
        self._buffer = ByteBuffer(pinned=True)
        self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def is_here(self) -> bool:
        """What it last carried has arrived."""
        return bool(self._arrived.query())  # type: ignore[no-untyped-call]

    def carry(self, there: torch.Tensor, fill: Callable[[memoryview], None]) -> None:
        """Fill bytes on the GPU, by the current stream; returns before they are there."""
        self._arrived.synchronize()
        data, here = self._buffer.take(len(there))
        fill(data)
        there.copy_(here, non_blocking=True)
        self._arrived.record()


class StepWork:
    """A step, its kernel, and the pieces in which it is done; in any order, by any thread.

    They are made one at a time.

    Attributes:
        step: what to do.
        pieces: runs of neighbouring blocks.
    """

    def __init__(self, step: Step, env: Env, out: Out | None) -> None:
        self.step = step
        self._env = env
        self._out = out
        self._op = op_of(step)
        self._kernel = None if self._op.moves_bytes else make_kernel(self._op, step, env)
        if out is None:  # what streams into a file is never factored
            load_solvers(env.device)
        self._lock = threading.Lock()
        self._crew = Crew()
        self._at_work: list[torch.cuda.Event] = []  # pieces that a GPU may not have done yet
        self._has_leader = self._is_ready = False
        self.pieces = cut_step(
            step, elements=env.elements, chunk=env.chunk, sample=env.sample
        )  # fmt: skip
        self._left = len(self.pieces)

    def process(self, lane: Lane, piece: list[grid.Block]) -> int:
        """Do a piece; returns the bytes read.  The first one loads what all of them need."""
        if self._kernel is None:
            return self._copy(lane, piece)
        with lane.at_work():
            if not self._is_ready:
                self._make_ready(lane, self._kernel)
            return self._compute(lane, self._kernel, piece)

    def _make_ready(self, lane: Lane, kernel: Kernel) -> None:
        """Prepare the kernel, or help the thread that does."""
        with self._lock:
            leads, self._has_leader = not self._has_leader, True
        if not leads:
            self._crew.help()
            return
        with self._crew:
            if lane.stream is None:
                kernel.share = self._crew.share  # type: ignore[method-assign]
            kernel.prepare()
            if lane.stream is not None:  # the streams of others must see it complete
                lane.stream.synchronize()
            self._is_ready = True

    def is_last(self) -> bool:
        """Count a piece that is done; True if it was the last."""
        with self._lock:
            self._left -= 1
            return self._left == 0

    def finish(self, lane: Lane | None = None) -> Any:
        """The step's result, after its last piece."""
        kernel, self._kernel = self._kernel, None
        if kernel is None:
            return None
        with nullcontext() if lane is None else lane.at_work():
            for event in self._at_work:
                event.wait()
            return kernel.finish()

    def _copy(self, lane: Lane, piece: list[grid.Block]) -> int:
        assert self._out is not None
        first, size = piece[0].start, sum(b.numel for b in piece)
        target = self._out.start + first
        data, _ = lane.output.take(size, target % PAGE)
        self._fill(data, self.step.inputs[0], first)
        self._out.put(target, data, True)
        return size

    def _compute(self, lane: Lane, kernel: Kernel, piece: list[grid.Block]) -> int:
        first, count = piece[0].start, sum(b.numel for b in piece)
        sources = () if self._op.is_module else self.step.inputs
        if self._op.has_pairs:  # one after the other through the same buffers
            sources = sources[2 * piece[0].pair : 2 * piece[0].pair + 2]
        if self._op.has_one_input:
            sources = sources[:1]
        inputs = [self._read(lane, i, s, first, count) for i, s in enumerate(sources)]
        outs: torch.Tensor | None = None
        if self._out is not None:
            dtype = self.step.output.dtype
            size = DTYPES[dtype].bits // 8
            target = self._out.start + first * size
            aligned = target % PAGE % size == 0
            data, host = lane.output.take(count * size, target % PAGE if aligned else 0, dtype)
            outs = torch.empty_like(host, device=lane.device) if lane.is_cuda else host
        kernel.run_piece(piece, inputs, outs)
        if outs is not None and lane.is_cuda:
            host.copy_(outs, non_blocking=True)
        if lane.stream is not None and self._out is not None:
            lane.stream.synchronize()
        elif lane.stream is not None:
            self._at_work.append(lane.stream.record_event())
        if self._out is not None:
            self._out.put(target, data, aligned)
        return sum(i.element_size() * count for i in inputs)

    def _read(
        self, lane: Lane, position: int, source: Source, first: int, count: int
    ) -> torch.Tensor:
        dtype = self._op.dtype(source)
        size = DTYPES[dtype].bits // 8

        def fill(start: int, data: memoryview) -> None:
            self._fill(data, source, first * size + start)

        return lane.load(position, count * size, dtype, fill)

    def _fill(self, data: memoryview, source: Source, start: int) -> None:
        if isinstance(source, TensorData):
            held = np.frombuffer(source.data, np.uint8)
            np.copyto(np.frombuffer(data, np.uint8), held[start : start + len(data)])  # no lock
        else:
            self._env.reader.read_into(source, start, data)


def make_kernel(op: Op, step: Step, env: Env) -> Kernel:
    """The kernel of a row, at its step."""
    made = function_of(op.kernel)(step, env)
    assert isinstance(made, Kernel)
    return made
