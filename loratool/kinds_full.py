"""The kinds of full rank that do not depend on W: numbers for places in it, random matrices.

Rows only.  The size of W is in few of their files: they are open until they are bound.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from loratool.frozen import replace
from loratool.kind import Kind
from loratool.kind_shapes import Sizes
from loratool.kinds_based import open_kind, shape_in
from loratool.kinds_peft import TALLEST, WIDEST

if TYPE_CHECKING:
    from loratool.adapter import DeltaSpec

SPARSE = "sparse"
"""Setting: 1 where random numbers are -1, 0 and 1, a third of them not 0, 2 where fewer are."""


def _of_circulant(spec: DeltaSpec) -> Sizes:
    rows, cols, b = shape_in(spec, "c3a_kernel")
    return rows * b, (cols * b,)


def _short(spec: DeltaSpec) -> int:
    out, (inner,) = spec.row.sizes(spec)
    return min(out, inner)


def _thin(spec: DeltaSpec, rank: int) -> int:
    return min(rank, _short(spec))


def _fits_bases(spec: DeltaSpec) -> bool:
    A, B, weights, gamma = (shape_in(spec, f"randlora_{n}") for n in
                            ("A", "B", "lambda", "gamma"))  # fmt: skip
    if (len(A), len(B), len(weights), len(gamma)) != (3, 3, 2, 2):
        return False
    same = weights[0] == A[0] == B[2] and A[1] == 1 and weights[1] == gamma[0]
    return same and gamma[1] <= A[2] and gamma[0] <= B[1]


def _holds_bases(spec: DeltaSpec, out: int, inner: int) -> bool:
    short, long = sorted((out, inner))
    return short == shape_in(spec, "randlora_gamma")[1] and long <= shape_in(spec, "randlora_B")[0]


def _fits_numbers(spec: DeltaSpec) -> bool:
    weights, gamma = shape_in(spec, "randlora_lambda"), shape_in(spec, "randlora_gamma")
    return len(weights) == len(gamma) == 2 and weights[1] == gamma[0] == -(-gamma[1] // weights[0])


def _holds_numbers(spec: DeltaSpec, out: int, inner: int) -> bool:
    return min(out, inner) == shape_in(spec, "randlora_gamma")[1]


def _largest(specs: Sequence[DeltaSpec]) -> dict[str, float]:
    sizes = [spec.row.sizes(spec) for spec in specs]
    return {WIDEST: max(inner for _, (inner,) in sizes), TALLEST: max(out for out, _ in sizes)}


def drawn_sides(spec: DeltaSpec) -> tuple[int, int, int]:
    """Short and long side of the matrices that RandLoRA's modules share, and how many there are."""
    short, long = sorted(int(spec.settings[side]) for side in (WIDEST, TALLEST))
    return short, long, -(-short // shape_in(spec, "randlora_lambda")[0])


def _drawn(spec: DeltaSpec) -> int:
    short, long, count = drawn_sides(spec)
    return shape_in(spec, "randlora_lambda")[0] * (short + long * count)


def _bases_rank(spec: DeltaSpec) -> int:
    r, count = shape_in(spec, "randlora_lambda")
    return _thin(spec, r * count)


def _is_list(spec: DeltaSpec) -> bool:
    count = shape_in(spec, "shira_weight")
    return len(count) == 1 and shape_in(spec, "shira_indices") == (2, *count)


def _additive(row: Kind, pairs: str, rank: Callable[[DeltaSpec], int]) -> Kind:
    """One that does not depend on the numbers in W."""
    return replace(row, is_additive=True, pairs=f"loratool.delta.{pairs}:pairs_of",
                   has_factors=True, product_rank=rank)  # fmt: skip


ROWS: tuple[Kind, ...] = (
    _additive(
        Kind("circulant", "loratool.delta.circulant:build", ("c3a_kernel",), (), True, "C3A",
             _of_circulant, "c3a_kernel", rank_axis=None),
        "circulant", _short,
    ),
    _additive(
        open_kind("fourier", "fourier:build", "fourierft_spectrum", "FourierFT", lambda s: (1, 1),
              lambda s, out, inner: s.fields["fourierft_spectrum"].numel <= out * inner), "fourier",
        lambda s: _thin(s, 2 * s.fields["fourierft_spectrum"].numel),
    ),
    _additive(
        open_kind("bases", "folded:build", "randlora_lambda", "RandLoRA", lambda s: (1, 1),
              _holds_bases, _fits_bases,
              more=("randlora_gamma", "randlora_A", "randlora_B")), "random_bases", _bases_rank,
    ),
    replace(
        _additive(
            open_kind("bases_seeded", "folded:build", "randlora_lambda", "RandLoRA of a seed",
                  lambda s: (1, 1), _holds_numbers, _fits_numbers, more=("randlora_gamma",)),
            "random_bases", _bases_rank,
        ), joint=_largest, is_open=lambda s: WIDEST not in s.settings, drawn=_drawn,
    ),
    replace(
        _additive(
            open_kind("sparse", "sparse:build", "shira_weight", "SHiRA", lambda s: (1, 1),
                  lambda s, out, inner: True, _is_list, more=("shira_indices",)), "sparse", _short,
        ), is_sum=lambda spec: True,
    ),
)  # fmt: skip
