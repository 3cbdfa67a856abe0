"""What every kind of change can do."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch

from loratool.adapter import DeltaSpec
from loratool.frozen import Frozen
from loratool.plan import DeltaPart


class Loaded(Frozen):
    """What a delta is built of, by the function that its kind names.

    Attributes:
        fields: role -> tensor, as stored.
        part: the spec (bound, where its tensors do not say how large W is) with orientation,
            region and expert.
        coefficient: of the change: weight · scaling, float64.
        dtype: float32 or float64, the type of the accumulator.
        fold: True where the coefficient may be multiplied in, before anything is rounded to
            ``dtype``; False keeps it apart, so that terms are products of stored numbers.
    """

    fields: Mapping[str, torch.Tensor]
    part: DeltaPart
    coefficient: float
    dtype: torch.dtype
    fold: bool = True

    @property
    def spec(self) -> DeltaSpec:
        """Of the part."""
        return self.part.spec

    @property
    def sizes(self) -> tuple[int, int]:
        """(out, in·k…) of the whole change."""
        out, inner = self.spec.row.sizes(self.spec)
        return out, math.prod(inner)

    def folded(self, tensor: torch.Tensor) -> tuple[torch.Tensor, float]:
        """A tensor in float64, times the coefficient if it may be, and what is left of that."""
        wide = tensor.double()
        return (wide * self.coefficient, 1.0) if self.fold else (wide, self.coefficient)


class Product(Frozen):
    """factor · left @ right, somewhere in a matrix.

    Attributes:
        left: (m, r).
        right: (r, n), the same type and device.
        factor: of the product.
        top: first row of the matrix that it is added to.
        side: first column.
    """

    left: torch.Tensor
    right: torch.Tensor
    factor: float
    top: int = 0
    side: int = 0


class Delta(ABC):
    """A change of one (rows, cols) matrix, with its tensors.

    The primitive is `add_to`, one block at a time, because not every kind is additive and no
    kind needs the whole ΔW.  Blocks are rectangles ``[r0, r1) × [c0, c1)`` in the coordinates
    of the matrix that the delta changes.

    Attributes:
        shape: (rows, cols).
        is_additive: `add_to` ignores ``base``.
        needs_whole: W must be given to `begin` before anything else.
        needs_rows: a way to read rows of W must be given to `attach` before `add_to`.
        roundings: how often one element's sum is rounded on its way through `add_to`.
    """

    shape: tuple[int, int]
    is_additive: bool = True
    needs_whole: bool = False
    needs_rows: bool = False
    roundings: int = 0

    @abstractmethod
    def add_to(
        self, acc: torch.Tensor, base: torch.Tensor, r0: int, r1: int, c0: int, c1: int
    ) -> None:
        """Add the block of W' - W to ``acc``, in place.

        Args:
            acc: (r1 - r0, c1 - c0) float32 or float64, the running sum.
            base: the block of W before any change, same shape and dtype.
            r0: first row.
            r1: one past the last row.
            c0: first column.
            c1: one past the last column.
        """

    def products(self) -> Sequence[Product] | None:
        """What `add_to` adds, where that is products of factors in rectangles; None otherwise."""
        return None

    def add_size(
        self, acc: torch.Tensor, base: torch.Tensor, r0: int, r1: int, c0: int, c1: int
    ) -> None:
        """Add an upper bound of Σ|terms| to ``acc``, for the error bound of `add_to`.

        Args: as `add_to`; float64.

        Raises:
            TypeError: the change is no sum of products.
        """
        raise TypeError(f"{type(self).__name__} is no sum of products")

    def terms(self, rows: torch.Tensor, cols: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """Numbers whose exact sum is the exact change of single elements.

        Args:
            rows: (n,) int64 row numbers.
            cols: (n,) int64 column numbers.
            base: (n,) float64, W at these places.

        Returns:
            (n, k) float64 on the CPU.

        Raises:
            TypeError: the change is no sum of products.
        """
        raise TypeError(f"{type(self).__name__} is no sum of products")

    def single(self) -> Delta | None:
        """The same change in float32, for a first look at many elements; its `roundings` are right.

        None where float32 could lose a product, and where there is no `at`.
        """
        return None

    def at(self, rows: torch.Tensor, cols: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Single elements of the change, for a second look.

        Args:
            rows: (n,) int64 row numbers, on the delta's device.
            cols: (n,) int64 column numbers.

        Returns:
            (n,) float64 sums, which `roundings` describes, and (n,) bounds of Σ|terms|.

        Raises:
            TypeError: a kind that has no `single`.
        """
        raise TypeError(f"{type(self).__name__} is not looked at by elements")

    @abstractmethod
    def scaled(self, factor: float) -> Delta:
        """The same change, ``factor`` times as strong: W + factor·(W' - W)."""

    @abstractmethod
    def to(self, device: torch.device) -> None:
        """Put its tensors on a device, in place: a delta is built for one step alone."""

    def begin(self, weight: torch.Tensor) -> None:
        """See all of W, (rows, cols) as the base stores it; called only if `needs_whole`."""
        raise NotImplementedError

    def attach(self, fetch: Callable[[int, int], torch.Tensor]) -> None:
        """Get a way to read rows of W, all columns, from the first to one past the last.

        Called only if `needs_rows`; threads may use it at once.
        """
        raise NotImplementedError

    def measure(self, base: torch.Tensor, r0: int, r1: int, c0: int, c1: int) -> None:
        """See a block of W before the first `add_to`; called only if `needs_measure`."""
        raise NotImplementedError

    @property
    def needs_measure(self) -> bool:
        """True if every block of W must pass through `measure` first (column or row norms)."""
        return False

    @property
    def wants_survey(self) -> bool:
        """True if the change itself must be seen whole, once more, before the first `add_to`."""
        return False

    def survey(self, like: torch.Tensor, r0: int, r1: int, c0: int, c1: int) -> None:
        """One block of a pass over the change; ``like`` has its type and device."""
        raise NotImplementedError

    def end_survey(self) -> None:
        """After the last block of a pass."""
        raise NotImplementedError

    def apply_to(self, weight: torch.Tensor) -> torch.Tensor:
        """W' for a whole matrix (rows, cols), in its dtype (float32 or float64)."""
        rows, cols = self.shape
        if self.needs_whole:
            self.begin(weight)
        if self.needs_rows:
            self.attach(lambda start, stop: weight[start:stop])
        if self.needs_measure:
            self.measure(weight, 0, rows, 0, cols)
        while self.wants_survey:
            self.survey(weight, 0, rows, 0, cols)
            self.end_survey()
        out = weight.clone()
        self.add_to(out, weight, 0, rows, 0, cols)
        return out

    def dense(self) -> torch.Tensor:
        """ΔW (rows, cols) float64; only for additive kinds.

        Raises:
            TypeError: the change depends on W.
        """
        if not self.is_additive:
            raise TypeError(f"{type(self).__name__} depends on the base weight: no ΔW without it")
        return self.apply_to(torch.zeros(self.shape, dtype=torch.float64))
