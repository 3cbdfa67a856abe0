"""Which elements of a matrix stay: decided block by block, the same for any blocks.

A selector sees every block once per pass, in any order and from any thread, until `wants_pass` is
false; then `apply` may be called for blocks in any order.
"""

from __future__ import annotations

import threading

import numpy as np
import torch

from loratool.frozen import Frozen
from loratool.linalg.draws import uniform

_DIGIT = 16
_BITS = {torch.float32: (torch.int32, 31), torch.float64: (torch.int64, 63)}


class Place(Frozen):
    """Where a block lies in its matrix.

    Attributes:
        index: number of the block, in the order in which passes see them.
        r0: first row.
        c0: first column.
        cols: columns of the whole matrix.
        offset: position of the matrix in a stack of several.
    """

    index: int
    r0: int = 0
    c0: int = 0
    cols: int = 0
    offset: int = 0

    def positions(self, like: torch.Tensor) -> torch.Tensor:
        """Row-major positions in the matrix: (m, n) int64."""
        rows, cols = like.shape
        row = torch.arange(self.r0, self.r0 + rows, device=like.device)
        col = torch.arange(self.c0, self.c0 + cols, device=like.device)
        return row[:, None] * self.cols + col + self.offset


class Largest:
    """The ``count`` elements of largest size, exactly; among equals the first ones.

    Radix selection on the bit patterns: two passes for float32, four for float64, and one more
    if not all elements of the threshold's size stay.  Memory 2^16 counters.

    Args:
        count: how many stay.
        total: elements of the matrix.
    """

    def __init__(self, count: int, total: int) -> None:
        self.is_all = count >= total
        self.is_none = count <= 0
        self._left = count  # of the elements that share the prefix, how many stay
        self._prefix = 0
        self._shift = -1
        self._counts: torch.Tensor | None = None
        self._ties: dict[int, int] = {}  # block -> elements of the threshold's size
        self._lock = threading.Lock()
        self._state = "done" if self.is_all or self.is_none else "digits"

    @property
    def wants_pass(self) -> bool:
        """True while the threshold is not known."""
        return self._state != "done"

    @property
    def counts_ties(self) -> bool:
        """`apply` must get blocks as passes saw them: it counts elements of the same size."""
        return bool(self._ties)

    def see(self, place: Place, values: torch.Tensor) -> None:
        """Count a block."""
        bits = _magnitude_bits(values)
        if self._state == "ties":
            self._ties[place.index] = int((bits == self._prefix).sum())
            return
        width = _BITS[values.dtype][1] + 1
        shift = width - _DIGIT if self._shift < 0 else self._shift
        if shift < width - _DIGIT:
            bits = _with_prefix(bits, shift + _DIGIT, self._prefix)
        digits = bits.bitwise_right_shift_(shift).bitwise_and_((1 << _DIGIT) - 1)
        counts = torch.bincount(digits.flatten(), minlength=1 << _DIGIT)
        with self._lock:
            self._shift = shift
            self._counts = counts if self._counts is None else self._counts.add_(counts)

    def end_pass(self) -> None:
        """Narrow the threshold down by one digit."""
        if self._state == "ties":
            self._state = "done"
            return
        assert self._counts is not None
        above = self._counts.flip(0).cumsum(0).cpu()  # elements with this digit or a larger one
        place = int(torch.searchsorted(above, self._left))
        digit = (1 << _DIGIT) - 1 - place
        equal = int(self._counts[digit])
        self._left -= int(above[place]) - equal
        self._prefix = self._prefix << _DIGIT | digit
        self._counts = None
        if self._shift:
            self._shift -= _DIGIT
        else:
            self._state = "ties" if self._left < equal else "done"

    def mask(self, place: Place, values: torch.Tensor) -> torch.Tensor:
        """True where an element stays."""
        if self.is_all or self.is_none:
            return torch.full_like(values, self.is_all, dtype=torch.bool)
        bits = _magnitude_bits(values)
        if not self._ties:
            return bits >= self._prefix
        before = sum(n for index, n in self._ties.items() if index < place.index)
        tied = bits == self._prefix
        order = tied.flatten().cumsum(0).view(values.shape) + before
        return (bits > self._prefix) | (tied & (order <= self._left))

    def apply(self, place: Place, values: torch.Tensor) -> torch.Tensor:
        """The elements that stay, zeros elsewhere."""
        if self.is_all or self.is_none or self._ties or not self._prefix:
            return values if self.is_all else values * self.mask(place, values)
        below = torch.tensor(self._prefix - 1, dtype=_BITS[values.dtype][0]).view(values.dtype)
        return torch.nn.functional.hardshrink(values, float(below))  # |v| > below, in one pass


class Middle:
    """All but the ``top`` largest and what lies below the next ``count``."""

    def __init__(self, top: int, count: int, total: int) -> None:
        top = max(0, min(top, total - count))
        self._outer, self._inner = Largest(top + count, total), Largest(top, total)

    @property
    def wants_pass(self) -> bool:
        """True while a threshold is not known."""
        return self._outer.wants_pass or self._inner.wants_pass

    @property
    def counts_ties(self) -> bool:
        """As `Largest.counts_ties`."""
        return self._outer.counts_ties or self._inner.counts_ties

    def see(self, place: Place, values: torch.Tensor) -> None:
        """Count a block."""
        for one in (self._outer, self._inner):
            if one.wants_pass:
                one.see(place, values)

    def end_pass(self) -> None:
        """Go on with both thresholds."""
        for one in (self._outer, self._inner):
            if one.wants_pass:
                one.end_pass()

    def apply(self, place: Place, values: torch.Tensor) -> torch.Tensor:
        """The elements that stay, zeros elsewhere."""
        keep = self._outer.mask(place, values) & ~self._inner.mask(place, values)
        return values * keep


class Chance:
    """Each element stays with a probability p and is divided by it; needs no pass.

    The random number depends on the key and the element's position alone.

    Args:
        density: p, or its mean over a row.
        epsilon: p runs from density - epsilon (smallest of a row) to density + epsilon (largest);
            blocks must then hold whole rows.
        key: 64-bit key.
    """

    wants_pass = counts_ties = False

    def __init__(self, density: float, epsilon: float, key: int) -> None:
        self._density = density
        self._epsilon = epsilon
        self._key = key

    def see(self, place: Place, values: torch.Tensor) -> None:
        """Never called."""

    def end_pass(self) -> None:
        """Never called."""

    def apply(self, place: Place, values: torch.Tensor) -> torch.Tensor:
        """The elements that stay, rescaled, zeros elsewhere."""
        if self._density >= 1:
            return values
        chance = torch.full_like(values, self._density)
        cols = values.shape[1]
        if self._epsilon and cols > 1:
            order = values.abs().argsort(dim=1, stable=True)
            places = torch.arange(cols, dtype=values.dtype, device=values.device)
            place_of = torch.empty_like(values).scatter_(1, order, places.expand_as(values))
            chance += self._epsilon * (2 * place_of / (cols - 1) - 1)
        keep = uniform(place.positions(values), self._key) < chance
        return values / chance * keep


Selector = Largest | Middle | Chance


def count_kept(density: float, total: int) -> int:
    """⌊density · total⌋, at least 1: even a matrix of four elements keeps its largest."""
    return max(1, int(density * total))


def _magnitude_bits(values: torch.Tensor) -> torch.Tensor:
    integer, width = _BITS[values.dtype]
    return values.contiguous().view(integer) & ((1 << width) - 1)


def _with_prefix(bits: torch.Tensor, shift: int, prefix: int) -> torch.Tensor:
    """The few elements whose leading digits are known to be those of the threshold: (n,)."""
    if bits.device.type != "cpu":
        return bits[(bits >> shift) == prefix]
    flat = bits.flatten()
    host = flat.numpy()  # torch's own comparison and choice take ten times as long
    low, high = prefix << shift, ((prefix + 1) << shift) - 1
    return flat[torch.from_numpy(np.flatnonzero((host >= low) & (host <= high)))]
