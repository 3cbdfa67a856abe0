"""DoRA: the direction of W + ΔW with learned lengths (Liu et al. 2024, arXiv 2402.09353)."""

from __future__ import annotations

import math

import torch

from loratool import kinds
from loratool.delta.base import Delta, Loaded
from loratool.delta.mutation import Moved
from loratool.frozen import replace
from loratool.kind_shapes import COLUMN_LENGTHS, ROW_LENGTHS
from loratool.plugins import function_of


class Magnitude(Delta):
    """W' = m / ‖V‖ · V with V = W + inner, norms along one axis of W.

    What loading takes from the base first is part of the inner change.

    A weight w other than 1 gives W + w·(W' - W), where W is always the unmodified base, so
    that the result does not depend on the order of several adapters.

    Args:
        inner: the change inside the norm.
        magnitude: lengths along ``axis``, of the accumulator's type: one for each row or column,
            or for as many of them side by side as make their number (columns of a kernel).
        axis: 0 = of rows (linear, conv), 1 = of columns (HF Conv1D, embedding; LyCORIS' input
            axis).
        weight: the user's coefficient.
    """

    is_additive = False

    def __init__(
        self, inner: Delta, magnitude: torch.Tensor, axis: int, weight: float = 1.0
    ) -> None:
        self.inner = inner
        self.magnitude = magnitude
        self.axis = axis
        self.weight = weight
        self.shape = inner.shape
        self._group = inner.shape[axis] // max(1, len(magnitude))
        # the product; squares summed in pairs, root, quotient; scaling, difference, weight
        self.roundings = inner.roundings + _halvings(inner.shape[1 - axis] * self._group) + 6
        self._squares = torch.zeros(inner.shape[axis], dtype=torch.float64, device=magnitude.device)

    @property
    def needs_whole(self) -> bool:  # type: ignore[override]
        """As the inner one."""
        return self.inner.needs_whole

    def begin(self, weight: torch.Tensor) -> None:
        """Shows W to the inner one."""
        self.inner.begin(weight)

    @property
    def needs_measure(self) -> bool:
        """Norms need all of a row or column, which no single block holds."""
        return True

    def measure(self, base: torch.Tensor, r0: int, r1: int, c0: int, c1: int) -> None:
        """Add the block's share of ‖V‖²."""
        squares = self._direction(base, r0, r1, c0, c1).double().square()
        if self.axis == 0:
            self._squares[r0:r1] += squares.sum(1)
        else:
            self._squares[c0:c1] += squares.sum(0)

    def add_to(
        self, acc: torch.Tensor, base: torch.Tensor, r0: int, r1: int, c0: int, c1: int
    ) -> None:
        """Add weight · (m/‖V‖ · V - W)."""
        gain = self._gain(acc.dtype, r0, r1, c0, c1)
        change = self._direction(base, r0, r1, c0, c1).mul_(gain).sub_(base)
        acc.add_(change, alpha=self.weight)

    def add_size(
        self, acc: torch.Tensor, base: torch.Tensor, r0: int, r1: int, c0: int, c1: int
    ) -> None:
        """|weight| · (|m|/‖V‖ · Σ|terms of V| + |W|)."""
        size = base.abs()
        self.inner.add_size(size, base, r0, r1, c0, c1)
        gain = self._gain(acc.dtype, r0, r1, c0, c1).abs_()
        acc.add_(size.mul_(gain).add_(base.abs()), alpha=abs(self.weight))

    def scaled(self, factor: float) -> Magnitude:
        """Interpolates towards W."""
        return Magnitude(self.inner, self.magnitude, self.axis, self.weight * factor)

    def to(self, device: torch.device) -> None:
        """Moves the factors, the lengths and the norms seen so far."""
        self.inner.to(device)
        self.magnitude, self._squares = self.magnitude.to(device), self._squares.to(device)

    def _gain(self, dtype: torch.dtype, r0: int, r1: int, c0: int, c1: int) -> torch.Tensor:
        """Lengths over norms, m / ‖V‖, of the block's rows or columns, broadcastable to it."""
        norms = self._squares.view(-1, self._group).sum(1).sqrt()
        gain = (self.magnitude.double() / norms).to(dtype).repeat_interleave(self._group)
        return gain[r0:r1, None] if self.axis == 0 else gain[None, c0:c1]

    def _direction(self, base: torch.Tensor, r0: int, r1: int, c0: int, c1: int) -> torch.Tensor:
        direction = base.clone()
        self.inner.add_to(direction, base, r0, r1, c0, c1)
        return direction


def _halvings(count: int) -> int:
    return math.ceil(math.log2(max(1, count)))


def build(given: Loaded) -> Magnitude:
    """Make the delta of a DoRA over any kind; the user's weight acts outside the norm.

    Args:
        given: those of the kind inside, as stored, and as many lengths as outputs or inputs.
    """
    part, dtype = given.part, given.dtype
    role = next(r for r in (ROW_LENGTHS, COLUMN_LENGTHS) if r in given.fields)
    kind = kinds.of_roles(given.fields.keys() - {role})
    assert kind is not None
    inside = replace(part, spec=replace(part.spec, kind=kind.name))
    inner = function_of(kind.implementation)(
        replace(given, part=inside, coefficient=part.spec.scaling, fold=True)
    )
    if part.spec.base_change:
        inner = Moved(inner, replace(inside, weight=1.0), dtype)
    axis = 1 if (role == COLUMN_LENGTHS) != part.transposed else 0
    lengths = given.fields[role].flatten().to(dtype)
    span = part.region.source_cols if axis else part.region.source_rows
    if span is not None:
        lengths = lengths[span[0] : span[1]]
    return Magnitude(inner, lengths, axis, weight=part.weight)
