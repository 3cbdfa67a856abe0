"""How the sum of a block becomes the output: nearest, exact or stochastic."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from loratool.delta.base import Delta
from loratool.engine import grid
from loratool.engine.buffers import bits_of
from loratool.engine.kernel import Env
from loratool.engine.step_args import SumArgs
from loratool.linalg import rounding
from loratool.linalg.exact import UNIT, product_terms, round_sums, round_where_decided
from loratool.linalg.rounding import INTEGERS

_AT_ONCE = 1 << 14  # elements summed exactly in one go: bounds the memory of their terms
_SINGLE_UNIT = 2.0**-24  # largest relative error of one float32 operation
_MOST_ROUNDINGS = 256  # with more, float32 leaves too many elements open
_PIECE = 1 << 16  # elements whose interval is rounded in one go: a dozen arrays stay in the cache


class Nearest:
    """Round the sum as it is.

    Args:
        target: type of the output.
        env: the run's.

    Attributes:
        settled: block -> elements that needed an exact sum.
    """

    def __init__(self, target: torch.dtype, env: Env) -> None:
        self.target = target
        self.env = env
        self.settled: dict[int, int] = {}

    @property
    def dtype(self) -> torch.dtype:
        """The type sums are formed in."""
        return rounding.accumulation_dtype(self.target)

    @property
    def rounds_as_torch(self) -> bool:
        """A copy to the output's type is all there is to it, but for -0."""
        return type(self) is Nearest and self.target != torch.float16

    def round(
        self, block: grid.Block, inputs: Sequence[torch.Tensor], acc: torch.Tensor,
        out: torch.Tensor,
    ) -> None:  # fmt: skip
        """Fill ``out`` from the sum ``acc``; ``inputs`` are the block's inputs, base first."""
        rounding.round_into(out, acc)
        keep_zero_signs(out, inputs[0], acc)


class Stochastic(Nearest):
    """Round up or down by chance: small changes survive on average.

    Args:
        seed: of the whole run.
        name: the tensor's; with the seed it makes the key.
    """

    def __init__(self, target: torch.dtype, env: Env, *, seed: int, name: str) -> None:
        super().__init__(target, env)
        digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
        self._key = int.from_bytes(digest, "little", signed=True)

    def round(
        self, block: grid.Block, inputs: Sequence[torch.Tensor], acc: torch.Tensor,
        out: torch.Tensor,
    ) -> None:  # fmt: skip
        """Fill ``out``."""
        for piece in _pieces(block):
            at = _inside(piece, block)
            rounding.stochastic_into(out[at], acc[at], key=self._key, start=piece.start)
        keep_zero_signs(out, inputs[0], acc)


class Exact(Nearest):
    """The correctly rounded result: float64 where its error bound decides, else exact sums.

    Of bfloat16, float32 decides all but some thousandths, which float64 then sees one by one.

    Attributes:
        deltas: additive; see `begin`.
        dense: (input position, weight) of whole replacements.
        singles: the deltas in float32; None if the first look is float64's.
    """

    def __init__(self, target: torch.dtype, env: Env) -> None:
        super().__init__(target, env)
        self.deltas: Sequence[Delta] = ()
        self.dense: Sequence[tuple[int, float]] = ()
        self.singles: list[Delta] | None = None

    def begin(
        self, deltas: Sequence[Delta], dense: Sequence[tuple[int, float]], *, plain: bool
    ) -> None:
        """Take the changes, before the first block.

        Args:
            deltas: in float64.
            dense: (input position, weight) of whole replacements.
            plain: nothing else is done to the sums, and the base has at most float32's bits.
        """
        self.deltas, self.dense = deltas, dense
        singles = [d.single() for d in deltas]
        found = [d for d in singles if d is not None]
        if (
            plain and not dense and self.target == torch.bfloat16 and len(found) == len(deltas)
            and sum(d.roundings + 1 for d in found) < _MOST_ROUNDINGS
        ):  # fmt: skip
            self.singles = found

    @property
    def dtype(self) -> torch.dtype:
        """Always float64."""
        return torch.float64

    def round(
        self, block: grid.Block, inputs: Sequence[torch.Tensor], acc: torch.Tensor,
        out: torch.Tensor,
    ) -> None:  # fmt: skip
        """Fill ``out``; sums in float32 are of `singles`, and finite."""
        if acc.dtype == torch.float32:
            self._round_singles(block, inputs, acc, out)
            return
        for piece in _pieces(block):
            at = _inside(piece, block)
            parts = [one[at] for one in inputs]
            open_ = self._round_piece(piece, parts, acc[at], out[at])
            keep_zero_signs(out[at], parts[0], acc[at])  # where nothing is in doubt
            if len(open_):
                self._settle(piece, parts, out[at], open_)

    def _round_piece(
        self, piece: grid.Block, inputs: Sequence[torch.Tensor], acc: torch.Tensor,
        out: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """Fill ``out``; returns the places (n, 2) of elements that the bound leaves open."""
        take, shape, device = self.env.scratch.take, (acc.shape[0], acc.shape[1]), acc.device
        error = take("error", shape, torch.float64, device)
        lower = take("lower", shape, torch.float64, device)
        upper = take("upper", shape, torch.float64, device)
        self.bound(piece, inputs, error, lower)
        return round_where_decided(out, acc, error, lower, upper)

    def bound(
        self, block: grid.Block, inputs: Sequence[torch.Tensor], error: torch.Tensor,
        work: torch.Tensor,
    ) -> None:  # fmt: skip
        """Fill ``error`` with a bound of |acc - exact sum|, ``work`` being scratch.

        Every rounding on the way moves a partial sum by at most 2⁻⁵³ of Σ|terms|, see `_share`.
        """
        base = work
        rounding.widen_into(base, inputs[0])
        torch.abs(base, out=error)
        for position, weight in self.dense:
            error.add_((inputs[position].double().abs() + base.abs()) * abs(weight))
        for delta in self.deltas:
            delta.add_size(error, base, block.r0, block.r1, block.c0, block.c1)
        error.mul_(_share(self.deltas, 3 * len(self.dense)) * UNIT)

    def _round_singles(
        self, block: grid.Block, inputs: Sequence[torch.Tensor], acc: torch.Tensor,
        out: torch.Tensor,
    ) -> None:  # fmt: skip
        open_ = self.round_decided(block, inputs, acc, out)
        keep_zero_signs(out, inputs[0], acc)  # where nothing is in doubt
        self.look_again(block, inputs, out, open_)

    def round_decided(
        self, block: grid.Block, inputs: Sequence[torch.Tensor], acc: torch.Tensor,
        out: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """Round sums of `singles` where their bound decides.

        Returns:
            Positions (n,) of all others, counted along the block's rows, for `look_again`.
        """
        assert self.singles is not None
        take, shape, device = self.env.scratch.take, (acc.shape[0], acc.shape[1]), acc.device
        error = take("error", shape, torch.float32, device)
        upper = take("upper", shape, torch.float32, device)
        high = take("high", shape, out.dtype, device)
        error.copy_(inputs[0]).abs_()
        for delta in self.singles:
            delta.add_size(error, acc, block.r0, block.r1, block.c0, block.c1)
        unit = self.single_unit
        torch.add(acc, error, alpha=unit, out=upper)
        torch.sub(acc, error, alpha=unit, out=error)
        out.copy_(error)
        high.copy_(upper)
        return differing(out, high)

    @property
    def single_unit(self) -> float:
        """By how much of Σ|terms| a sum of `singles` may be off."""
        return _share(self.singles or ()) * _SINGLE_UNIT

    def look_again(
        self, block: grid.Block, inputs: Sequence[torch.Tensor], out: torch.Tensor,
        open_: torch.Tensor,
    ) -> None:  # fmt: skip
        """Round what `round_decided` left open; of several blocks at once, as one."""
        for first in range(0, len(open_), _AT_ONCE):
            self._look_again(block, inputs, out, open_[first : first + _AT_ONCE])

    def _look_again(
        self, block: grid.Block, inputs: Sequence[torch.Tensor], out: torch.Tensor,
        open_: torch.Tensor,
    ) -> None:  # fmt: skip
        """Round the elements at ``open_`` (n,), counted along the rows, by sums in float64."""
        cols = block.c1 - block.c0
        rows = open_ // cols
        at = rows + block.r0, open_ - rows * cols + block.c0
        sums = inputs[0].reshape(-1).index_select(0, open_).double()
        size = sums.abs()
        for delta in self.deltas:
            change, bound = delta.at(*at)
            sums.add_(change)
            size.add_(bound)
        fresh = torch.empty_like(sums, dtype=out.dtype)[:, None]
        error = size.mul_(_share(self.deltas) * UNIT)[:, None]
        lower, upper = torch.empty_like(error), torch.empty_like(error)
        left = round_where_decided(fresh, sums[:, None], error, lower, upper)
        out.view(-1).index_copy_(0, open_, fresh[:, 0])
        if len(left):
            places = open_[left[:, 0]]
            self._settle(block, inputs, out, torch.stack([places // cols, places % cols], dim=1))

    def _settle(
        self, block: grid.Block, inputs: Sequence[torch.Tensor], out: torch.Tensor,
        places: torch.Tensor,
    ) -> None:  # fmt: skip
        """Sum the elements at ``places`` (n, 2) of the block exactly."""
        self.settled[block.index] = self.settled.get(block.index, 0) + len(places)
        for first in range(0, len(places), _AT_ONCE):
            rows, cols = places[first : first + _AT_ONCE].T
            values = [one[rows, cols].double().cpu() for one in inputs]
            base = values[0]
            at = (rows.cpu() + block.r0, cols.cpu() + block.c0)
            terms = [base[:, None]]
            for position, weight in self.dense:
                pair = torch.stack([values[position], -base], dim=1)
                terms.append(product_terms(pair, torch.full((1, 1), weight, dtype=torch.float64)))
            terms += [delta.terms(*at, base) for delta in self.deltas]
            sums, is_zero = round_sums(torch.cat(terms, dim=1), self.target)
            keep = is_zero & (base == 0)  # a zero that stays zero keeps its sign
            sums = torch.where(keep, base.to(self.target), sums)
            out[rows, cols] = sums.to(out.device)


def _share(deltas: Sequence[Delta], more: int = 0) -> float:
    """By how many units of Σ|terms| roundings may move a sum of deltas and W.

    Besides those of the deltas and ``more``, 4 are for the ends of the interval; 1 % is for terms
    of second order and the bound's own rounding.
    """
    return 1.01 * (4 + more + sum(delta.roundings + 1 for delta in deltas))


def _pieces(block: grid.Block) -> Iterator[grid.Block]:
    """Cut a block (whole rows, or part of one row) into smaller ones."""
    cols = block.c1 - block.c0
    width = min(cols, _PIECE)
    height = max(1, _PIECE // max(1, width))
    for r in range(block.r0, block.r1, height):
        for c in range(block.c0, block.c1, width):
            start = block.start + (r - block.r0) * cols + c - block.c0
            yield grid.Block(
                block.index, r, min(r + height, block.r1), c, min(c + width, block.c1), start
            )


def _inside(piece: grid.Block, block: grid.Block) -> tuple[slice, slice]:
    return (
        slice(piece.r0 - block.r0, piece.r1 - block.r0),
        slice(piece.c0 - block.c0, piece.c1 - block.c0),
    )


def make_rounder(args: SumArgs, target: torch.dtype, env: Env, name: str) -> Nearest:
    """The rounder that a step asks for."""
    if args.rounding == "exact":
        return Exact(target, env)
    if args.rounding == "stochastic":
        return Stochastic(target, env, seed=args.seed or 0, name=name)
    return Nearest(target, env)


def differing(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """(n,) positions, counted along the rows, where the bits of two blocks differ."""
    if one.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(bits_of(one) != bits_of(other)))
    bits = INTEGERS[one.element_size()]
    return torch.nonzero((one.view(bits) != other.view(bits)).flatten())[:, 0]


def keep_zero_signs(out: torch.Tensor, base: torch.Tensor, acc: torch.Tensor) -> None:
    """Where the sum equals the base the base's bits stay; only -0 could have lost its sign."""
    # To ask a GPU costs more than to do it.
    if out.dtype == base.dtype and (base.is_cuda or has_negative_zeros(bits_of(base))):
        bits = INTEGERS[base.element_size()]
        is_negative_zero = base.view(bits) == torch.iinfo(bits).min
        out.masked_fill_(is_negative_zero & (acc == 0), -0.0)


def has_negative_zeros(bits: np.ndarray[Any, Any]) -> bool:
    """Whether an element is -0, by the `bits_of` a float tensor."""
    return bool(bits.min() == np.iinfo(bits.dtype).min)
