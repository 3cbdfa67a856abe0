"""What will be done, as data: a flat list of steps, made before any tensor byte is read.

A plan is a list, not a graph, because no output tensor depends on another one.  It serialises
to JSON: ``--dry-run`` prints it, tests compare it, resume and provenance hash it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from loratool.adapter import DeltaSpec, Source, TensorData, TensorRef
from loratool.dtypes import numel, tensor_bytes
from loratool.frozen import Frozen, Struct, asdict, field


class TensorSpec(Frozen):
    """A tensor to be written: name in the output file, dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return tensor_bytes(self.dtype, self.shape)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return numel(self.shape)


def label(name: str) -> TensorSpec:
    """The output of a step that makes no tensor of a file, but a result of this name."""
    return TensorSpec(name, "F32", (1, 1))


class Span(Frozen):
    """``range(start, stop, step)`` along one axis of a target."""

    start: int
    stop: int
    step: int = 1

    def __len__(self) -> int:
        return len(range(self.start, self.stop, self.step))


class Region(Frozen):
    """Which part of a target's 2-D view a delta covers, and which part of the delta goes there.

    The 2-D view of a target is (rows, cols) with every axis but the last (linear, embedding,
    experts) or but the first (conv) flattened.  Empty tuples mean "all".  The rows of the delta,
    in the target's orientation, from ``source_rows[0]`` on are laid on the spans in order.

    Attributes:
        rows: spans of target rows, in the order of the delta's rows.
        cols: spans of target columns.
        source_rows: (start, stop) rows of ΔW used; None = all.
        source_cols: (start, stop) columns of ΔW used; None = all.
    """

    rows: tuple[Span, ...] = ()
    cols: tuple[Span, ...] = ()
    source_rows: tuple[int, int] | None = None
    source_cols: tuple[int, int] | None = None


class DeltaPart(Frozen):
    """One delta that goes into one target.

    Attributes:
        spec: what is added.
        weight: the user's coefficient.
        region: where.
        expert: which expert of a flattened 3-D pair of factors; None otherwise.
        transposed: the target stores (in, out): (lora_B @ lora_A)ᵀ is added.
        adapter: position of the adapter on the command line, for reports.
    """

    spec: DeltaSpec
    weight: float
    region: Region = Region()
    expert: int | None = None
    transposed: bool = False
    adapter: int = 0


class ReplacePart(Frozen):
    """New values for a whole tensor or for some rows: W becomes W + weight·(new - W).

    Attributes:
        source: the new values.
        weight: the user's coefficient.
        rows: rows replaced, in the order of the source's rows; None = all.
        adapter: position of the adapter on the command line.
        origin: as in `Replacement.origin`.
    """

    source: Source
    weight: float
    rows: tuple[int, ...] | None = None
    adapter: int = 0
    origin: str = ""


Part = DeltaPart | ReplacePart


class Place(Frozen):
    """A delta, or a slice of one, on a tensor of the base.

    Attributes:
        part: the delta with its region, expert and orientation, at weight 1.
        source: the tensor: the base's, or the one that the adapter puts in its place.
        view: (rows, cols) of it.
    """

    part: DeltaPart
    source: Source
    view: tuple[int, int]

    @property
    def is_cut(self) -> bool:
        """Only some rows or columns of the delta lie here."""
        return bool(self.part.region.source_rows or self.part.region.source_cols)


class Step(Frozen):
    """One output tensor (or one module of an adapter) and how to make it.

    Attributes:
        op: name of a row of `loratool.engine.rows.OPS`.
        output: the tensor written; for ops that fill an adapter, a label.
        inputs: what is read, base first.
        view: (rows, cols) of the 2-D view on which the block grid lies.
        parts: deltas and replacements, in the order of the adapters.
        shard: index into `Plan.shards`, -1 if nothing is streamed.
        args: further plain data for the kernel, as the op's row takes it.
    """

    op: str
    output: TensorSpec
    inputs: tuple[Source, ...]
    view: tuple[int, int]
    parts: tuple[Part, ...] = ()
    shard: int = -1
    args: Mapping[str, Any] = field(default_factory=dict)

    def refs(self) -> Iterator[TensorRef]:
        """Every tensor of a file that it reads."""
        sources = list(self.inputs)
        for part in self.parts:
            if isinstance(part, DeltaPart):
                sources += part.spec.fields.values()
            else:
                sources.append(part.source)
        yield from (ref for s in sources if isinstance(s, TensorRef) for ref in s.stored)


def module_step(op: str, specs: Sequence[DeltaSpec], **args: Any) -> Step:
    """A step on one module of one or several adapters, which streams nothing."""
    parts = tuple(DeltaPart(spec, 1.0, adapter=n) for n, spec in enumerate(specs))
    return Step(op, label(specs[0].name), (), (1, 1), parts, args=args)


class ShardPlan(Frozen):
    """One output file of a checkpoint.

    Attributes:
        name: path relative to the output folder ("" if the output is this one file).
        tensors: in file order.
        metadata: header metadata.
        header: bytes to reuse as they are (length prefix included) when nothing in an input
            file changes; None = build one that ends on a page boundary.
        twin: the input file that has exactly these bytes.
    """

    name: str
    tensors: tuple[TensorSpec, ...]
    metadata: Mapping[str, str]
    header: bytes | None = None
    twin: Path | None = None


class Plan(Frozen):
    """All steps of one command.

    Attributes:
        command: the command's name.
        steps: in output order.
        shards: output files of a checkpoint; empty when the output is an adapter or a report.
        options: every resolved option that changes bytes.
        inputs: input label -> content id, for provenance and resume.
        notes: what the user should know before it runs.
    """

    command: str
    steps: tuple[Step, ...]
    shards: tuple[ShardPlan, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def output_bytes(self) -> int:
        """Bytes of tensor data that will be written."""
        return sum(t.nbytes for s in self.shards for t in s.tensors)

    @property
    def read_bytes(self) -> int:
        """Bytes of input tensor data that will be read at least once."""
        return sum(i.nbytes for s in self.steps for i in s.inputs)

    def refs(self) -> Iterator[TensorRef]:
        """Every tensor of a file that the steps read."""
        for step in self.steps:
            yield from step.refs()

    def to_json(self) -> dict[str, Any]:
        """The plan as plain JSON types; bytes become their sha256, paths their last part."""
        out = plain(self)
        assert isinstance(out, dict)
        return out

    def plan_id(self) -> str:
        """sha256 of the canonical JSON: equal plans write equal bytes."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


_ATOMS = (str, int, float, bool)
_LATER = ("settings", "numbers")  # fields that were added later


def plain(value: Any) -> Any:
    """A value in JSON's types, the same for equal content wherever its files lie."""
    return _plain(value, {})


def _plain(value: Any, made: dict[TensorSpec, Any]) -> Any:
    """`plain`; a tensor that is in a step and in its shard is laid out once."""
    if value is None or type(value) in _ATOMS:
        return value
    if isinstance(value, TensorRef):
        return [value.path.name, value.name, value.dtype, list(value.shape), value.start]
    if isinstance(value, TensorData):
        return [value.name, value.dtype, list(value.shape), hashlib.sha256(value.data).hexdigest()]
    if isinstance(value, (list, tuple)):
        return [_plain(v, made) for v in value]
    if isinstance(value, TensorSpec):
        if value not in made:
            made[value] = {"name": value.name, "dtype": value.dtype, "shape": list(value.shape)}
        return made[value]
    if isinstance(value, Struct):
        # An empty one is not said: plans without it keep the identity that they had before it.
        return {n: _plain(v, made) for n, v in asdict(value).items() if v or n not in _LATER}
    if isinstance(value, Mapping):
        return {str(k): _plain(v, made) for k, v in value.items()}
    if isinstance(value, (bytes, memoryview)):
        return hashlib.sha256(value).hexdigest()
    if isinstance(value, Path):
        return value.name
    return value
