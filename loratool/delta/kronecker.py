"""LoKr: the Kronecker product of two small matrices, each whole or low-rank (arXiv 2212.10650).

ΔW = scaling · w1 ⊗ w2: element (i·k + p, j·n + q) is w1[i, j] · w2[p, q], where w2 is (k, n).
A convolution's kernel is part of q.  The product of thin factors is one of thin factors again:
(l1 r1) ⊗ (l2 r2) = (l1 ⊗ l2)(r1 ⊗ r2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch

from loratool.adapter import DeltaSpec
from loratool.delta.base import Delta, Loaded
from loratool.delta.dense import Dense
from loratool.delta.lowrank import LowRank, Pair, thin_factors, thinnest
from loratool.linalg.exact import product_terms

Range = tuple[int, int]
"""(first, stop)."""
_Whole = LowRank | Dense
_Add = Callable[[torch.Tensor, torch.Tensor, int, int, int, int], None]


class Kronecker(Delta):
    """ΔW = coefficient · first ⊗ second, or some rows and columns of it.

    Args:
        first: its coefficient is 1 where this one's is not.
        second: with a coefficient of 1.
        coefficient: 1 where it is folded into ``first``.
        rows: of the product, None = all.
        cols: of the product, None = all.
    """

    def __init__(
        self,
        first: _Whole,
        second: _Whole,
        coefficient: float = 1.0,
        rows: Range | None = None,
        cols: Range | None = None,
    ) -> None:
        self.first, self.second, self.coefficient = first, second, coefficient
        (m, n), (p, q) = first.shape, second.shape
        self._rows, self._cols = rows or (0, m * p), cols or (0, n * q)
        self.shape = (self._rows[1] - self._rows[0], self._cols[1] - self._cols[0])
        self.roundings = first.roundings + second.roundings + 2

    def add_to(
        self, acc: torch.Tensor, base: torch.Tensor, r0: int, r1: int, c0: int, c1: int
    ) -> None:
        """Each element of the one times one of the other."""
        adds = self.first.add_to, self.second.add_to
        self._add(acc, (r0, r1), (c0, c1), *adds, self.coefficient)

    def add_size(
        self, acc: torch.Tensor, base: torch.Tensor, r0: int, r1: int, c0: int, c1: int
    ) -> None:
        """The product of both bounds."""
        adds = self.first.add_size, self.second.add_size
        self._add(acc, (r0, r1), (c0, c1), *adds, abs(self.coefficient))

    def terms(self, rows: torch.Tensor, cols: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """Products of four numbers at most; two of them at a time are exact in float64."""
        rows, cols = rows + self._rows[0], cols + self._cols[0]
        height, width = self.second.shape
        left, right = _elements(self.first, rows // height, cols // width)
        other_left, other_right = _elements(self.second, rows % height, cols % width)
        factor = torch.full((1, 1), self.coefficient, dtype=torch.float64)
        lefts = (left[:, :, None] * other_left[:, None, :]).flatten(1)
        rights = (right[:, :, None] * other_right[:, None, :]).flatten(1)
        return product_terms(lefts, rights, factor)

    def scaled(self, factor: float) -> Kronecker:
        """Multiplies the coefficient."""
        both = self.first, self.second
        return Kronecker(*both, self.coefficient * factor, self._rows, self._cols)

    def to(self, device: torch.device) -> None:
        """Moves both matrices."""
        self.first.to(device)
        self.second.to(device)

    def _add(
        self, acc: torch.Tensor, rows: Range, cols: Range, first: _Add, second: _Add, factor: float
    ) -> None:
        """A block, in nine tiles at most: its borders need not be those of the second matrix."""
        height, width = self.second.shape
        for i, p, row in _runs(rows[0] + self._rows[0], rows[1] + self._rows[0], height):
            for j, q, col in _runs(cols[0] + self._cols[0], cols[1] + self._cols[0], width):
                one, other = _made(first, acc, i, j), _made(second, acc, p, q)
                (m, n), (k, w) = one.shape, other.shape
                tile = acc[row : row + m * k, col : col + n * w].view(m, k, n, w)
                tile.addcmul_(one[:, None, :, None], other[None, :, None, :], value=factor)


def _runs(start: int, stop: int, size: int) -> Iterator[tuple[Range, Range, int]]:
    """A range of multiples of ``size`` and rests: part of one, whole ones, part of one.

    Each is (range of quotients, range of rests, offset from ``start``).

    Example:
        >>> list(_runs(2, 11, 4))
        [((0, 1), (2, 4), 0), ((1, 2), (0, 4), 2), ((2, 3), (0, 3), 6)]
    """
    at = start
    while at < stop:
        first, rest = divmod(at, size)
        many = 0 if rest else (stop - at) // size
        if many:
            run, end = ((first, first + many), (0, size)), at + many * size
        else:
            end = min(stop, (first + 1) * size)
            run = ((first, first + 1), (rest, rest + end - at))
        yield *run, at - start
        at = end


def _made(add: _Add, like: torch.Tensor, rows: Range, cols: Range) -> torch.Tensor:
    """A part of one matrix."""
    block = like.new_zeros(rows[1] - rows[0], cols[1] - cols[0])
    add(block, block, *rows, *cols)
    return block


def _elements(
    matrix: _Whole, rows: torch.Tensor, cols: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, r) each, float64 on the CPU: Σ over r of their products are single elements."""
    if isinstance(matrix, Dense):
        found = matrix.values[rows.to(matrix.values.device), cols.to(matrix.values.device)]
        return found.double().cpu()[:, None], torch.ones(len(rows), 1, dtype=torch.float64)
    device = matrix.left.device
    left, right = matrix.left[rows.to(device)], matrix.right[:, cols.to(device)].T
    return left.double().cpu(), right.double().cpu()


def build(given: Loaded) -> Kronecker:
    """Make the delta of a ``kronecker`` spec.

    Args:
        given: lokr_w1 (ol, im), or lokr_w1_a (ol, r) and lokr_w1_b (r, im); lokr_w2
            (ok, in, k…), or lokr_w2_a (ok, r) and lokr_w2_b (r, in…), or with a core lokr_t2
            (r, r, k…) lokr_w2_a (r, ok) and lokr_w2_b (r, in).
    """
    part, dtype = given.part, given.dtype
    made: list[_Whole] = []
    for number in (1, 2):
        factor = given.coefficient if given.fold and number == 1 else 1.0
        left, right = _side(given.fields, number)
        if part.transposed:
            left, right = (None, right.T) if left is None else (right.T, left.T)
        if left is None:
            made.append(Dense((right * factor).to(dtype).contiguous()))
        else:
            made.append(LowRank((left * factor).to(dtype), right.to(dtype)))
    rows, cols = part.region.source_rows, part.region.source_cols
    return Kronecker(made[0], made[1], 1.0 if given.fold else given.coefficient, rows, cols)


def pairs_of(fields: Mapping[str, torch.Tensor], spec: DeltaSpec) -> list[Pair]:
    """The same change as one product of thin factors, float64, scaling left out."""
    (left, right), (other_left, other_right) = _thin(fields, 1), _thin(fields, 2)
    return [(_product(left, other_left), _product(right, other_right))]


def _product(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The Kronecker product; torch.kron needs strides that a core's transpose has not."""
    size = (one.shape[0] * other.shape[0], one.shape[1] * other.shape[1])
    return (one[:, None, :, None] * other[None, :, None, :]).reshape(size)


def _side(
    fields: Mapping[str, torch.Tensor], number: int
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Thin factors of one of the matrices in float64, or None and the matrix; kernels flattened."""
    name = f"lokr_w{number}"
    if name in fields:
        return None, fields[name].double().flatten(1)
    core = fields.get("lokr_t2") if number == 2 else None
    return thin_factors(fields[f"{name}_a"], fields[f"{name}_b"], core)


def _thin(fields: Mapping[str, torch.Tensor], number: int) -> Pair:
    left, right = _side(fields, number)
    if left is None:
        return thinnest(right)
    return (
        (left, right) if left.shape[1] <= min(len(left), right.shape[1]) else thinnest(left @ right)
    )
