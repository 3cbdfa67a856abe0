"""Several deltas of one matrix made into one change by an element-wise method."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import torch

from loratool.delta.base import Delta
from loratool.linalg.dense import DenseCombiner
from loratool.linalg.select import Place

_PASS_ELEMENTS = 1 << 18  # of a block that only passes see


class Combined(Delta):
    """ΔW = method(ΔW_1, …, ΔW_T), never whole in memory.

    Args:
        deltas: of the same shape, additive, as trained; the combiner has the weights.
        combiner: method, weights and selectors.
        transposed: the deltas are laid out (in, out); the method sees (out, in).
        offset: position of this matrix in a stack of experts.
    """

    def __init__(
        self, deltas: Sequence[Delta], combiner: DenseCombiner, transposed: bool, offset: int
    ) -> None:
        self.deltas = tuple(deltas)
        self.combiner = combiner
        self.transposed = transposed
        self.offset = offset
        self.shape = deltas[0].shape
        self.roundings = max(d.roundings for d in deltas) + 2
        self._room = threading.local()  # memory fresh from the system costs more than a product

    @property
    def wants_survey(self) -> bool:
        """True while thresholds are not known."""
        return self.combiner.wants_pass

    def survey(self, like: torch.Tensor, r0: int, r1: int, c0: int, c1: int) -> None:
        """See the block of every ΔW_t; from any thread."""
        make = self._stack if self.combiner.sees_together else self._each
        self.combiner.see(self._place(r0, c0), make(like, r0, r1, c0, c1))

    def end_survey(self) -> None:
        """Narrow the thresholds down."""
        self.combiner.end_pass()

    def add_to(
        self, acc: torch.Tensor, base: torch.Tensor, r0: int, r1: int, c0: int, c1: int
    ) -> None:
        """Combine the blocks; the method of a row sees all of the row."""
        if not self.combiner.needs_rows:
            stack = self._stack(acc, r0, r1, c0, c1)
            acc.add_(self._turn(self.combiner.combine(self._place(r0, c0), stack)))
            return
        rows, cols = self.shape
        if self.transposed:
            stack = self._stack(acc, 0, rows, c0, c1)
            found = self._turn(self.combiner.combine(self._place(0, c0), stack))[r0:r1]
        else:
            stack = self._stack(acc, r0, r1, 0, cols)
            found = self.combiner.combine(self._place(r0, 0), stack)[:, c0:c1]
        acc.add_(found)

    def scaled(self, factor: float) -> Combined:
        """Multiplies every delta."""
        deltas = [d.scaled(factor) for d in self.deltas]
        return Combined(deltas, self.combiner, self.transposed, self.offset)

    def to(self, device: torch.device) -> None:
        """Moves every delta."""
        for delta in self.deltas:
            delta.to(device)

    def _stack(self, like: torch.Tensor, r0: int, r1: int, c0: int, c1: int) -> torch.Tensor:
        """(T, m, n) of the method's orientation, in this thread's room."""
        stack = self._zeros(len(self.deltas), like, (r1 - r0, c1 - c0))
        for part, delta in zip(stack, self.deltas, strict=True):
            delta.add_to(part, part, r0, r1, c0, c1)
        return stack.mT if self.transposed else stack

    def _each(
        self, like: torch.Tensor, r0: int, r1: int, c0: int, c1: int
    ) -> Iterator[torch.Tensor]:
        """The same one after the other, in the same room."""
        for delta in self.deltas:
            (part,) = self._zeros(1, like, (r1 - r0, c1 - c0))
            delta.add_to(part, part, r0, r1, c0, c1)
            yield self._turn(part)

    def _zeros(self, count: int, like: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        need = count * shape[0] * shape[1]
        held: torch.Tensor | None = getattr(self._room, "held", None)
        if held is None or held.numel() < need or held.dtype != like.dtype:
            held = self._room.held = torch.empty(need, dtype=like.dtype, device=like.device)
        return held[:need].zero_().view(count, *shape)

    def _turn(self, block: torch.Tensor) -> torch.Tensor:
        return block.T if self.transposed else block

    def _place(self, r0: int, c0: int) -> Place:
        index = r0 * self.shape[1] + c0  # blocks in the order of their bytes
        if self.transposed:
            return Place(index, c0, r0, self.shape[0], self.offset)
        return Place(index, r0, c0, self.shape[1], self.offset)


class Cut(Delta):
    """Some rows and columns of a combined change whose other parts lie in other tensors.

    What a method keeps depends on the whole matrix, as it was trained: passes see all of it, the
    part on the blocks that sums are formed on, the rest in blocks of its own.

    Args:
        inner: the whole change.
        rows: (start, stop) of the part, None = all.
        cols: (start, stop) of the part, None = all.
    """

    def __init__(
        self, inner: Combined, rows: tuple[int, int] | None, cols: tuple[int, int] | None
    ) -> None:
        self.inner = inner
        self.rows, self.cols = rows, cols
        self._top, self._bottom = rows or (0, inner.shape[0])
        self._left, self._right = cols or (0, inner.shape[1])
        self.shape = (self._bottom - self._top, self._right - self._left)
        self.roundings = inner.roundings
        self._like = torch.empty(0)

    @property
    def wants_survey(self) -> bool:
        """As the whole."""
        return self.inner.wants_survey

    def survey(self, like: torch.Tensor, r0: int, r1: int, c0: int, c1: int) -> None:
        """See a block of the part."""
        self._like = like
        self.inner.survey(like, *self._inside(r0, r1, c0, c1))

    def end_survey(self) -> None:
        """See the rest."""
        for block in self._rest():
            self.inner.survey(self._like, *block)
        self.inner.end_survey()

    def add_to(
        self, acc: torch.Tensor, base: torch.Tensor, r0: int, r1: int, c0: int, c1: int
    ) -> None:
        """Adds the block of the whole."""
        self.inner.add_to(acc, base, *self._inside(r0, r1, c0, c1))

    def scaled(self, factor: float) -> Cut:
        """Scales the whole."""
        return Cut(self.inner.scaled(factor), self.rows, self.cols)

    def to(self, device: torch.device) -> None:
        """Moves the whole."""
        self.inner.to(device)

    def _inside(self, r0: int, r1: int, c0: int, c1: int) -> tuple[int, int, int, int]:
        return r0 + self._top, r1 + self._top, c0 + self._left, c1 + self._left

    def _rest(self) -> Iterator[tuple[int, int, int, int]]:
        rows, cols = self.inner.shape
        top, bottom, left, right = self._top, self._bottom, self._left, self._right
        for r0, r1, c0, c1 in (
            (0, top, 0, cols), (bottom, rows, 0, cols), (top, bottom, 0, left),
            (top, bottom, right, cols),
        ):  # fmt: skip
            height = max(1, _PASS_ELEMENTS // max(1, c1 - c0))
            if c0 < c1:
                for start in range(r0, r1, height):
                    yield start, min(start + height, r1), c0, c1
