"""Where streamed blocks go: the shards of a checkpoint under construction."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from msgspec import to_builtins

from loratool.adapter import TensorRef
from loratool.location import RemoteFile
from loratool.plan import Plan, Step
from loratool.store.checksum import Piece
from loratool.store.disk import lies_in_memory, refusals_as
from loratool.store.far_file import FarFile, Made
from loratool.store.header import build_header
from loratool.store.marker import Content, content_of, file_metadata
from loratool.store.reader import FileReader
from loratool.store.shard_writer import PAGE, FilePart, ShardWriter, clone_file
from loratool.store.staging import FarPlace, Output

_FILES_IN_MEMORY = 8  # measured: one takes 2.5 GB/s of 8 threads, four 9, eight 16


class CheckpointSink:
    """Opens each shard at its first block, completes it after its last step.

    Args:
        plan: its shards and steps.
        output: the staging area; shards that it already holds are left alone.
    """

    def __init__(self, plan: Plan, output: Output) -> None:
        self._plan = plan
        self._output = output
        self._lock = threading.Lock()
        self._writers: dict[int, ShardWriter] = {}
        self._left = [0] * len(plan.shards)
        for step in plan.steps:
            self._left[step.shard] += 1
        self._results: list[list[Any]] = [[] for _ in plan.shards]
        self._layouts = [self._layout(i) for i in range(len(plan.shards))]

    def _layout(self, index: int) -> tuple[bytes, dict[str, int], int]:
        shard = self._plan.shards[index]
        header, starts = self._header(index, content_of(sum(t.nbytes for t in shard.tensors), 0))
        if shard.header is not None:
            shift = len(shard.header) - len(header)
            header, starts = shard.header, tuple(s + shift for s in starts)
        offsets = dict(zip((t.name for t in shard.tensors), starts, strict=True))
        size = len(header) + sum(t.nbytes for t in shard.tensors)
        return header, offsets, size

    def _header(self, index: int, data: Content) -> tuple[bytes, tuple[int, ...]]:
        """Header and starts of a shard; the only file of an output says what it holds."""
        shard = self._plan.shards[index]
        metadata = shard.metadata
        if not self._output.is_folder:
            metadata = file_metadata(metadata or {}, data, self._output.plan_id)
        tensors = [(t.name, t.dtype, t.shape) for t in shard.tensors]
        return build_header(tensors, metadata, align=PAGE)

    @cached_property
    def files_at_once(self) -> int:
        """How many shards should be in the making: of few, few are lost where a run is killed."""
        in_memory = self._output.keeps_files and lies_in_memory(self._output.staging.parent)
        return _FILES_IN_MEMORY if in_memory else 1

    def finished_results(self, shard: int) -> list[Any] | None:
        """Results of a shard that an earlier run completed, None if it is still to do."""
        line = self._output.finished.get(self._plan.shards[shard].name)
        return None if line is None else line.get("results", [])

    def clone(self, step: Step, reader: FileReader) -> bool:
        """Take an untouched shard over in one piece where the file system shares blocks.

        Args:
            step: one of the shard's, which then copy the tensors of one file.
            reader: has that file.
        """
        name, twin = self._plan.shards[step.shard].name, self._plan.shards[step.shard].twin
        source = step.inputs[0] if step.inputs else None
        if twin is None or not isinstance(source, TensorRef) or isinstance(source.file, RemoteFile):
            return False
        path = self._output.create(name)
        with reader.lend(source) as file, refusals_as("cannot clone", path):
            is_cloned = clone_file(file, path)
        if is_cloned:
            self._output.place(name)  # no journal: a rerun clones as fast as it would check
        return is_cloned

    def out(self, step: Step) -> StepOut:
        """Where the step's tensor goes."""
        return StepOut(self, step.shard, self._offset(step))

    def _offset(self, step: Step) -> int:
        return self._layouts[step.shard][1][step.output.name]

    def written(self, step: Step) -> TensorRef:
        """Where a finished step's tensor lies in the staging area."""
        name = self._plan.shards[step.shard].name
        out = step.output
        return TensorRef(
            self._output.finished_path(name),
            out.name,
            out.dtype,
            out.shape,
            self._offset(step),
            out.nbytes,
        )

    def writer(self, shard: int) -> ShardWriter:
        """The file of a shard, created when it is first asked for."""
        with self._lock:
            writer = self._writers.get(shard)
            if writer is None:
                header, _offsets, size = self._layouts[shard]
                path = self._output.create(self._plan.shards[shard].name)
                writer = self._writers[shard] = ShardWriter(path, header, size)
            return writer

    def far(self, shard: int) -> FarPlace | None:
        """How another machine makes a shard by itself, see `Output.far`."""
        return self._output.far(self._plan.shards[shard].name)

    def far_file(self, steps: Sequence[Step]) -> FarFile:
        """The shard of these steps, which are all of it, for another machine to make."""
        shard = steps[0].shard
        far, (header, _offsets, size) = self.far(shard), self._layouts[shard]
        assert far is not None and len(steps) == self._left[shard]
        return far.order(header, size, [self._offset(step) for step in steps])

    def step_done(
        self, step: Step, result: Any, pieces: Sequence[Piece] = (), made: Made | None = None
    ) -> None:
        """Count a finished step; the last one completes its shard.

        Args:
            step: of the plan.
            result: of its kernel.
            pieces: checksums of what another process wrote.
            made: the whole shard, if another machine has made it.
        """
        if made is None:
            self.writer(step.shard).sums.take(pieces)
        with self._lock:
            if result is not None:
                self._results[step.shard].append(to_builtins(result))
            self._left[step.shard] -= 1
            if self._left[step.shard]:
                return
        name, results = self._plan.shards[step.shard].name, self._results[step.shard]
        if made is not None and (far := self.far(step.shard)):
            far.take_in(made, results)
            return
        writer = self.writer(step.shard)
        if not self._output.is_folder:
            writer.rewrite_header(self._header(step.shard, content_of(*writer.data_sum()))[0])
        writer.finish()
        with self._lock:
            del self._writers[step.shard]
        self._output.mark_finished(name, writer.size, results, writer.pieces())

    def close(self) -> None:
        """Let go of open files (after an error; no worker may be writing)."""
        with self._lock:
            for writer in self._writers.values():
                writer.close()
            self._writers.clear()


class StepOut:
    """Where a step's tensor goes, see `loratool.engine.step.Out`.

    Attributes:
        sink: that it is a place of.
        start: where the tensor begins in its file.
    """

    def __init__(self, sink: CheckpointSink, shard: int, start: int) -> None:
        self.sink, self._shard, self.start = sink, shard, start

    def put(self, offset: int, data: memoryview, aligned: bool) -> None:
        """Write a piece at an absolute offset of the file."""
        self.sink.writer(self._shard).put(offset, data, aligned)

    def pieces(self) -> tuple[Piece, ...]:
        """None: the file's own writer takes them."""
        return ()

    def part(self) -> FilePart:
        """The same place, for another process."""
        return FilePart(self.sink.writer(self._shard).path, self.start)

    def is_far(self) -> bool:
        """True where another machine makes the whole shard, and cannot write into this one's."""
        return self.sink.far(self._shard) is not None
