"""Correctly rounded sums against exact rational arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from loratool.errors import NumericError
from loratool.linalg import exact, rounding
from tests.make import exact_round, randn

TARGETS = {
    torch.bfloat16: (8, -126),
    torch.float16: (11, -14),
    torch.float32: (24, -126),
    torch.float64: (53, -1022),
}


def fractions(row: torch.Tensor) -> Fraction:
    return sum(map(Fraction, row.tolist()), Fraction(0))


@pytest.mark.parametrize("target", TARGETS)
def test_sums_are_rounded_once(target: torch.dtype) -> None:
    """Ties, near-ties of 2⁻⁴⁰ to 2⁻²⁰⁰ steps, cancellation, subnormals: all by the definition."""
    bits, low = TARGETS[target]
    base = torch.cat([randn(200, seed=0), randn(50, seed=1, scale=2.0 ** (low - 3))])
    base = base.to(target).double()
    half = rounding.ulp(base, target) / 2
    rows = [
        torch.stack([base, half * up, half * up * sign * 2.0**-near], dim=1)
        for up in (1.0, -1.0)
        for sign in (0.0, 1.0, -1.0)
        for near in (40, 53, 200)
    ]
    cancel = torch.stack([base, -base, half * 2.0**-60], dim=1)
    noise = torch.cat([base[:, None], randn(250, 2, seed=3).double() * half[:, None]], dim=1)
    terms = torch.cat([*rows, cancel, noise])
    got, is_zero = exact.round_sums(terms, target)
    for row, value, zero in zip(terms, got.double().tolist(), is_zero.tolist(), strict=True):
        want = exact_round(fractions(row), bits, low)
        assert Fraction(value) == want
        assert zero == (fractions(row) == 0)


def test_an_exact_zero_is_positive() -> None:
    terms = torch.tensor([[1.5, -1.5], [0.0, -0.0]], dtype=torch.float64)
    got, is_zero = exact.round_sums(terms, torch.bfloat16)
    assert got.tolist() == [0.0, 0.0] and is_zero.all()
    assert math.copysign(1, got[0].item()) == 1


def test_products_are_exact() -> None:
    left = torch.cat([randn(40, 3, seed=1), randn(40, 3, seed=2).double() / 3])  # 24 and 53 bits
    left = left.double()
    right = randn(80, 3, seed=3).double() * math.pi
    factor = torch.full((1, 1), 0.7, dtype=torch.float64)
    terms = exact.product_terms(left, right, factor)
    for i in range(80):
        pairs = zip(left[i].tolist(), right[i].tolist(), strict=True)
        want = Fraction(0.7) * sum(Fraction(a) * Fraction(b) for a, b in pairs)
        assert fractions(terms[i]) == want


def test_products_of_float32_factors_need_one_term_each() -> None:
    left, right = (randn(20, 4, seed=s).double() for s in (1, 2))
    assert exact.product_terms(left, right).shape == (20, 4)


@pytest.mark.parametrize("size", [1e-95, 1e95])
def test_factors_out_of_range_are_refused_not_rounded(size: float) -> None:
    with pytest.raises(NumericError, match="exact product"):
        exact.product_terms(torch.full((1, 1), size, dtype=torch.float64))


@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16, torch.float32])
def test_what_counts_as_decided_is_right_for_the_whole_interval(target: torch.dtype) -> None:
    bits, low = TARGETS[target]
    approx = randn(60, 50, seed=5).double()
    approx[1:5] *= 2.0 ** (low - 1)  # subnormals, and the edge to them
    approx[0] = (approx[0].to(target).double()) + rounding.ulp(approx[0], target) / 2
    error = approx.abs() * 2.0 ** -(bits + 6)
    out = torch.empty(60, 50, dtype=target)
    scratch = torch.empty_like(approx), torch.empty_like(approx)
    places = exact.round_where_decided(out, approx, error, *scratch)
    open_ = torch.zeros(60, 50, dtype=torch.bool)
    open_[places.unbind(1)] = True
    assert open_[0].all() and not open_.all()
    for end in (approx - error, approx, approx + error):
        values = zip(end[~open_].tolist(), out[~open_].double().tolist(), strict=True)
        assert all(exact_round(Fraction(v), bits, low) == Fraction(got) for v, got in values)


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_not_finite_is_copied(target: torch.dtype) -> None:
    payload = torch.tensor([0x7FFFFFFFFFFFFFFF, -1], dtype=torch.int64).view(torch.float64)
    wild = torch.tensor([math.inf, -math.inf, math.nan, 1.0], dtype=torch.float64)
    approx = torch.cat([wild, payload])[None]
    out = torch.empty(1, 6, dtype=target)
    scratch = torch.empty_like(approx), torch.empty_like(approx)
    places = exact.round_where_decided(out, approx, torch.zeros_like(approx), *scratch)
    assert out[0, :2].tolist() == [math.inf, -math.inf] and out[0, 3] == 1
    assert out[0, [2, 4, 5]].isnan().all() and len(places) == 0
