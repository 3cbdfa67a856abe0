"""Reused memory: page-aligned byte buffers for files, scratch tensors for sums."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from loratool.engine.grid import Block
from loratool.linalg.rounding import INTEGERS
from loratool.store.shard_writer import PAGE

TORCH_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""safetensors name -> torch type, for the types that kernels compute with."""

WIDENED_DTYPES: dict[str, torch.dtype] = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""Types that factors may be stored in, widened to float32 when they are loaded."""


def torch_dtype(name: str) -> torch.dtype:
    """The torch type of a safetensors name that tensors are read or written in."""
    return TORCH_DTYPES.get(name) or WIDENED_DTYPES[name]


SAFETENSORS_NAMES = {v: k for k, v in TORCH_DTYPES.items()}


class ByteBuffer:
    """A growing byte buffer whose first byte lies on a page boundary.

    Args:
        pinned: page-locked, for copies to and from a GPU.
    """

    def __init__(self, pinned: bool = False) -> None:
        self._pinned = pinned
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._view = memoryview(b"")
        self._last: tuple[tuple[int, int, str], tuple[memoryview, torch.Tensor]] | None = None

    def take(self, nbytes: int, pad: int = 0, dtype: str = "U8") -> tuple[memoryview, torch.Tensor]:
        """``nbytes`` bytes whose address is ``pad`` modulo the page size.

        Returns:
            The bytes twice: as a memoryview for the file, as a flat tensor for the kernel.
        """
        asked = (nbytes, pad, dtype)
        if self._last is None or self._last[0] != asked:  # most pieces are like the one before
            self._last = None  # before more is taken
            data, raw = self._take(nbytes + pad, pad)
            self._last = asked, (data, raw.view(torch_dtype(dtype)))
        return self._last[1]

    def _take(self, need: int, pad: int) -> tuple[memoryview, torch.Tensor]:
        if need > len(self._view):
            # page-locked memory mostly begins on a page, and comes in powers of two: none to spare
            raw = torch.empty(need + PAGE * (not self._pinned), dtype=torch.uint8,
                              pin_memory=self._pinned)  # fmt: skip
            if raw.data_ptr() % PAGE and len(raw) == need:
                raw = torch.empty(need + PAGE, dtype=torch.uint8, pin_memory=True)
            shift = -raw.data_ptr() % PAGE
            self._bytes = raw[shift : shift + need]
            self._view = memoryview(self._bytes.numpy())  # type: ignore[arg-type]
        return self._view[pad:need], self._bytes[pad:need]


class Cut:
    """The elements of a piece by its blocks.

    Args:
        values: all of them, contiguous.
        piece: neighbouring blocks.

    Attributes:
        values: as given.
        blocks: of each block (rows, cols).
    """

    def __init__(self, values: torch.Tensor, piece: Sequence[Block]) -> None:
        self.values = values
        self.shapes = [(block.r1 - block.r0, block.c1 - block.c0) for block in piece]
        parts = torch.split_with_sizes(values.view(-1), [block.numel for block in piece])
        self.blocks = [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]


class Scratch(threading.local):
    """Per-thread tensors by role, grown on demand and never given back."""

    def __init__(self) -> None:
        self._cuts: dict[str, Cut] = {}
        self._tensors: dict[tuple[str, torch.dtype, torch.device], torch.Tensor] = {}
        self._views: dict[tuple[str, torch.dtype, torch.device], torch.Tensor] = {}  # the last
        self._bits: tuple[torch.Tensor, torch.Tensor] | None = None  # the last

    def __reduce__(self) -> tuple[type[Scratch], tuple[()]]:
        return Scratch, ()

    def bits(self, values: torch.Tensor) -> torch.Tensor:
        """A buffer as signed integers of the same size: mostly that of the piece before."""
        if self._bits is None or self._bits[0] is not values:
            self._bits = values, values.view(INTEGERS[values.element_size()])
        return self._bits[1]

    def take(
        self, role: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """An uninitialised (rows, cols) tensor; the same memory for the same role."""
        key = (role, dtype, device)
        view = self._views.get(key)
        if view is not None and view.shape == shape:  # as for nearly every block of a tensor
            return view
        need = shape[0] * shape[1]
        held = self._tensors.get(key)
        if held is None or held.numel() < need:
            held = self._tensors[key] = torch.empty(need, dtype=dtype, device=device)
        view = self._views[key] = held[:need].view(shape)
        return view

    def cut(self, role: str, values: torch.Tensor, piece: Sequence[Block]) -> Cut:
        """A buffer cut into the blocks of a piece: on a CPU mostly the cut of the piece before.

        Args:
            role: of the buffer.
            values: contiguous.
            piece: neighbouring blocks that it holds.
        """
        if values.is_cuda:
            return Cut(values, piece)
        made = self._cuts.get(role)
        shapes = [(block.r1 - block.r0, block.c1 - block.c0) for block in piece]
        if made is None or made.values is not values or made.shapes != shapes:
            made = self._cuts[role] = Cut(values, piece)
        return made


class Pool:
    """Whole float32 tensors that a finished step hands on to the next one.

    On a CPU, memory fresh from the system costs more than a subtraction into it; a GPU's
    allocator keeps its own.
    """

    def __init__(self) -> None:
        self._spare: list[torch.Tensor] = []
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[Pool], tuple[()]]:
        return Pool, ()

    def take(self, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        """An uninitialised tensor; a spare one that is too small is let go."""
        need = math.prod(shape)
        with self._lock:
            held = self._spare.pop() if self._spare else None
        if held is None or held.numel() < need:
            held = None  # before the next one is made
            held = torch.empty(need, dtype=torch.float32, device=device)
        return held[:need].view(shape)

    def give(self, tensor: torch.Tensor) -> None:
        """Take back what `take` returned, once nothing reads it any more."""
        if tensor.device.type == "cpu":
            whole = tensor.untyped_storage()
            spare = torch.empty(0, dtype=torch.float32).set_(whole)
            with self._lock:
                self._spare.append(spare)


def bits_of(values: torch.Tensor) -> np.ndarray[Any, Any]:
    """Elements of a tensor of the CPU as signed integers of the same size, whose memory they are.

    numpy takes half to a tenth of torch's time for comparisons, counts and extremes of integers.
    """
    return values.view(INTEGERS[values.element_size()]).numpy()


def from_bytes(data: torch.Tensor, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """View a uint8 tensor as the elements that it holds."""
    return data.view(torch_dtype(dtype)).view(shape)


def to_bytes(tensor: torch.Tensor) -> memoryview:
    """Row-major bytes of a CPU tensor (shares memory if it is contiguous)."""
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]
