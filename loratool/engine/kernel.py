"""What kernels share: loading inputs, and the life of one step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from loratool.adapter import Source, TensorData
from loratool.engine import grid
from loratool.engine.buffers import (
    TORCH_DTYPES,
    WIDENED_DTYPES,
    ByteBuffer,
    Pool,
    Scratch,
    from_bytes,
)
from loratool.engine.rows import args_of
from loratool.errors import BadFileError, NumericError
from loratool.frozen import Struct, field
from loratool.plan import Step
from loratool.report.text import plural
from loratool.store.reader import FileReader

T = TypeVar("T")

_CPU = torch.device("cpu")
_PIECE = 1 << 20


class Env(Struct):
    """What every kernel of a run shares.  Another process gets it without what is in memory.

    Attributes:
        reader: input files.
        device: where blocks live.
        others: more devices, which do steps of their own.
        elements: block size of the grid on that device.
        scratch: per-thread memory.
        allow_nonfinite: NaN and infinity in inputs pass.
        pool: whole tensors, handed from step to step.
        chunk: bytes per piece of input.
        sample: only a few blocks of a step are looked at.
    """

    reader: FileReader
    device: torch.device = _CPU
    elements: int = grid.CPU_ELEMENTS
    scratch: Scratch = field(default_factory=Scratch)
    allow_nonfinite: bool = False
    pool: Pool = field(default_factory=Pool)
    chunk: int = grid.CPU_CHUNK_BYTES
    sample: bool = False
    others: tuple[torch.device, ...] = ()

    def load(self, source: Source, *, must_be_finite: bool = False) -> torch.Tensor:
        """A whole tensor on the CPU, in its stored type (8-bit floats as float32).

        Args:
            source: which.
            must_be_finite: refuse NaN and infinity whatever the user allows.

        Raises:
            NumericError: a float tensor holds NaN or infinity.
            BadFileError: not a type that can be computed with.
        """
        if source.dtype not in TORCH_DTYPES and source.dtype not in WIDENED_DTYPES:
            raise BadFileError(
                "LT-333", "tensor of this type cannot be computed with", key=source.name,
                expected="a float type", got=source.dtype,
            )  # fmt: skip
        if isinstance(source, TensorData):
            raw = torch.frombuffer(bytearray(source.data), dtype=torch.uint8)
        else:
            raw = torch.empty(source.nbytes, dtype=torch.uint8)
            self.reader.read_into(source, 0, memoryview(raw.numpy()))  # type: ignore[arg-type]
        tensor = from_bytes(raw, source.dtype, source.shape)
        if source.dtype in WIDENED_DTYPES:
            tensor = tensor.float()
        if tensor.is_floating_point() and (must_be_finite or not self.allow_nonfinite):
            _refuse_nonfinite(tensor, source)
        return tensor

    def rows(self, source: Source, view: tuple[int, int], start: int, stop: int) -> torch.Tensor:
        """Some rows of a tensor's view, on the device, in its stored type."""
        if isinstance(source, TensorData):
            return self.load(source).view(view)[start:stop].to(self.device)
        width = view[1] * TORCH_DTYPES[source.dtype].itemsize
        raw = torch.empty((stop - start) * width, dtype=torch.uint8)
        self.reader.read_into(source, start * width, memoryview(raw.numpy()))  # type: ignore[arg-type]
        return from_bytes(raw, source.dtype, (stop - start, view[1])).to(self.device)

    def stream(
        self, source: Source, view: tuple[int, int]
    ) -> Iterator[tuple[grid.Block, torch.Tensor]]:
        """A tensor block by block, on the device, in its stored type."""
        buffer = ByteBuffer()
        for block in grid.blocks(view, self.elements):
            shape = (block.r1 - block.r0, block.c1 - block.c0)
            if isinstance(source, TensorData):
                yield block, self.load(source).view(view)[block.r0 : block.r1, block.c0 : block.c1]
                continue
            size = TORCH_DTYPES[source.dtype].itemsize
            bytes_, raw = buffer.take(block.numel * size)
            self.reader.read_into(source, block.start * size, bytes_)
            yield block, from_bytes(raw, source.dtype, shape).to(self.device)


class Kernel:
    """One step at work.  `prepare`, then `run` for every block in any order, then `finish`.

    Args:
        step: what to do.
        env: shared by all kernels of the run.
    """

    def __init__(self, step: Step, env: Env) -> None:
        self.step = step
        self.args: Any = args_of(step)
        self.env = env

    def prepare(self) -> None:
        """Load what all blocks need (factors, norms)."""

    def share(self, work: Callable[[T], None], items: Sequence[T]) -> None:
        """``work`` of every item; within `prepare` threads that wait for it help."""
        for item in items:
            work(item)

    def run_piece(
        self, piece: list[grid.Block], inputs: list[torch.Tensor], out: torch.Tensor | None
    ) -> None:
        """Process neighbouring blocks.

        Args:
            piece: where they lie.
            inputs: of each of the step's inputs, the elements of all of them; flat, stored types.
            out: likewise of the output's type, to be filled; None if nothing is written.
        """
        for block, blocks, made in self.cut(piece, inputs, out):
            self.run(block, blocks, made)

    def cut(
        self, piece: list[grid.Block], inputs: Sequence[torch.Tensor], out: torch.Tensor | None
    ) -> Iterator[tuple[grid.Block, list[torch.Tensor], torch.Tensor | None]]:
        """The blocks of a piece with their inputs and output, each (rows, cols)."""
        cut = self.env.scratch.cut
        of_inputs = [cut(f"input {i}", one, piece).blocks for i, one in enumerate(inputs)]
        made = [None] * len(piece) if out is None else cut("output", out, piece).blocks
        for block, own, *blocks in zip(piece, made, *of_inputs, strict=True):
            yield block, blocks, own

    def run(self, block: grid.Block, inputs: list[torch.Tensor], out: torch.Tensor | None) -> None:
        """Process one block.

        Args:
            block: where it lies.
            inputs: the block of each of the step's inputs (rows, cols), stored types.
            out: (rows, cols) of the output's type, to be filled; None if nothing is written.
        """
        raise NotImplementedError

    def finish(self) -> Any:
        """The step's result, after its last block."""
        return None


class ModuleKernel(Kernel):
    """A step that is one block, done in `finish`."""

    def run(self, block: grid.Block, inputs: list[torch.Tensor], out: torch.Tensor | None) -> None:
        """Nothing."""


def _refuse_nonfinite(tensor: torch.Tensor, source: Source) -> None:
    pieces = torch.split(tensor.view(-1), _PIECE)
    if all(bool(torch.isfinite(piece).all()) for piece in pieces):
        return
    bad = torch.cat([~torch.isfinite(piece) for piece in pieces])
    count, first = int(bad.sum()), torch.nonzero(bad.view(tensor.shape))[0].tolist()
    raise NumericError(
        "LT-801",
        "tensor holds NaN or infinity",
        file=getattr(source, "file", None),
        key=source.name,
        expected="finite values",
        got=f"{plural(count, 'bad value')}, the first at {first}",
        hint="--allow-nonfinite lets them pass, where a command has it",
    )
