"""Where streamed blocks go: the shards of a checkpoint under construction."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

from loratool.adapter import TensorRef
from loratool.plan import Plan, Step
from loratool.store.disk import refusals_as
from loratool.store.header import build_header
from loratool.store.marker import Content, content_of, file_metadata
from loratool.store.reader import FileReader
from loratool.store.shard_writer import PAGE, ShardWriter, clone_file
from loratool.store.writer import StagedOutput


class CheckpointSink:
    """Opens each shard at its first block, completes it after its last step.

    Args:
        plan: its shards and steps.
        output: the staging area; shards that it already holds are left alone.
    """

    def __init__(self, plan: Plan, output: StagedOutput) -> None:
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
        if twin is None:
            return False
        source = step.inputs[0]
        assert isinstance(source, TensorRef)
        path = self._output.create(name)
        with reader.lend(source) as file, refusals_as("cannot clone", path):
            is_cloned = clone_file(file, path)
        if is_cloned:
            self._output.place(name)  # no journal: a rerun clones as fast as it would check
        return is_cloned

    def offset(self, step: Step) -> int:
        """Where the step's tensor starts in its file."""
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
            self.offset(step),
            out.nbytes,
        )

    def put(self, step: Step, offset: int, data: memoryview, aligned: bool) -> None:
        """Write a piece of the step's tensor at an absolute file offset."""
        self._writer(step.shard).put(offset, data, aligned)

    def _writer(self, shard: int) -> ShardWriter:
        with self._lock:
            writer = self._writers.get(shard)
            if writer is None:
                header, _offsets, size = self._layouts[shard]
                path = self._output.create(self._plan.shards[shard].name)
                writer = self._writers[shard] = ShardWriter(path, header, size)
            return writer

    def step_done(self, step: Step, result: Any) -> None:
        """Count a finished step; the last one completes its shard."""
        with self._lock:
            if result is not None:
                self._results[step.shard].append(dataclasses.asdict(result))
            self._left[step.shard] -= 1
            if self._left[step.shard]:
                return
        writer = self._writer(step.shard)  # also creates a shard without any bytes
        if not self._output.is_folder:
            writer.rewrite_header(self._header(step.shard, content_of(*writer.data_sum()))[0])
        writer.finish()
        with self._lock:
            del self._writers[step.shard]
        name = self._plan.shards[step.shard].name
        self._output.mark_finished(name, writer.size, self._results[step.shard], writer.pieces())

    def close(self) -> None:
        """Let go of open files (after an error; no worker may be writing)."""
        with self._lock:
            for writer in self._writers.values():
                writer.close()
            self._writers.clear()
