"""Rank rules at their thresholds, and the shared budget against brute force."""

from __future__ import annotations

import functools
import itertools
import math
import random
import time

import pytest
import torch

from loratool.linalg.rank import RankRule, allocate_ranks, choose_rank
from loratool.linalg.shares import allocate_with_shares


def _sigma(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


S = _sigma(3, 1, 1, 1, 0)  # Σσ² = 12, Σσ = 6


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (RankRule(), 4),  # zeros are never kept
        (RankRule(rank=2), 2),
        (RankRule(rank=9), 4),
        (RankRule(energy=0.0), 0),
        (RankRule(energy=0.75), 1),  # 9/12 exactly
        (RankRule(energy=0.7500001), 2),
        (RankRule(energy=10 / 12), 2),
        (RankRule(energy=1.0), 4),
        (RankRule(error=0.5), 1),  # √(3/12) exactly
        (RankRule(error=0.4999999), 2),
        (RankRule(error=math.sqrt(1 / 12)), 3),
        (RankRule(error=0.0), 4),
        (RankRule(error=1.0), 0),
        (RankRule(sv_ratio=3.0), 4),  # ties with the threshold are kept
        (RankRule(sv_ratio=2.9999999), 1),
        (RankRule(sv_ratio=1.0), 1),
        (RankRule(sv_sum=0.5), 1),
        (RankRule(sv_sum=0.5000001), 2),
        (RankRule(sv_sum=1.0), 4),
        (RankRule(sv_min=1.0), 4),
        (RankRule(sv_min=1.0000001), 1),
        (RankRule(sv_base=0.1), 4),  # base norm 10
        (RankRule(sv_base=0.31), 0),
        (RankRule(energy=0.9, max_rank=1), 1),
        (RankRule(rank=3, energy=0.9, sv_ratio=2.0), 1),
        (RankRule(rank=0), 0),
    ],
)
def test_definitions(rule: RankRule, expected: int) -> None:
    assert choose_rank(S, rule, base_norm=10.0) == expected


def test_thresholds_survive_rounding() -> None:
    """σ that meet a threshold in real numbers, each off by one unit in the last place."""
    for step in (-1, 0, 1):
        sigma = _sigma(3, 1) * (1 + step * 2.0**-52) * _sigma(1, 1 - step * 2.0**-52)
        assert choose_rank(sigma, RankRule(energy=0.9)) == 1
        assert choose_rank(sigma, RankRule(error=math.sqrt(0.1))) == 1
        assert choose_rank(sigma, RankRule(sv_ratio=3)) == 2
        assert choose_rank(sigma, RankRule(sv_sum=0.75)) == 1


def test_rounding_of_zeros_is_no_rank() -> None:
    assert choose_rank(_sigma(1, 0.5, 2e-16, 1e-17), RankRule(rank=4)) == 2
    assert choose_rank(_sigma(0, 0), RankRule(energy=0.9)) == 0
    assert choose_rank(_sigma(), RankRule(rank=4)) == 0


def test_truncated_spectrum() -> None:
    """With the true energy, the leading values give what the whole spectrum gives."""
    whole = torch.linspace(2, 0.1, 40, dtype=torch.float64)
    total = float(whole.square().sum())
    for energy in (0.3, 0.6, 0.8):
        rule = RankRule(energy=energy)
        assert choose_rank(whole[:30], rule, total_square=total) == choose_rank(whole, rule)
        rule = RankRule(error=math.sqrt(1 - energy))
        assert choose_rank(whole[:30], rule, total_square=total) == choose_rank(whole, rule)
    assert choose_rank(whole[:5], RankRule(energy=0.9), total_square=total) == 5


def test_sv_base_needs_the_base() -> None:
    with pytest.raises(ValueError, match="base_norm"):
        choose_rank(S, RankRule(sv_base=0.1))


def _energy(squares: list[torch.Tensor], ranks: tuple[int, ...] | list[int]) -> float:
    return math.fsum(float(v) for s, k in zip(squares, ranks, strict=True) for v in s[:k])


@pytest.mark.parametrize("seed", range(5))
def test_budget_equals_brute_force(seed: int) -> None:
    """100 small cases each: integers with many ties, heavy tails, nearly flat ones."""
    rng = random.Random(seed)
    for _ in range(100):
        squares, costs = [], []
        for _ in range(rng.randint(1, 4)):
            make = rng.choice(
                (
                    lambda: rng.randint(0, 5),
                    lambda: rng.random() ** 3,
                    lambda: rng.choice((1, 0.99)),
                )
            )
            values = sorted((float(make()) for _ in range(rng.randint(0, 4))), reverse=True)
            squares.append(torch.tensor(values, dtype=torch.float64))
            costs.append(rng.choice((1, 2, 3, 5, 7, 11)))
        budget = rng.randint(0, sum(c * len(s) for c, s in zip(costs, squares, strict=True)) + 2)
        best = max(
            _energy(squares, ranks)
            for ranks in itertools.product(*(range(len(s) + 1) for s in squares))
            if sum(k * c for k, c in zip(ranks, costs, strict=True)) <= budget
        )
        ranks = allocate_ranks(squares, costs, budget)
        assert sum(k * c for k, c in zip(ranks, costs, strict=True)) <= budget
        assert _energy(squares, ranks) == pytest.approx(best, rel=1e-14, abs=0)


def test_greedy_by_rate_is_beaten() -> None:
    """The densest value first fills the budget badly: 10 alone is worth more than 6."""
    squares = [_sigma(6.0), _sigma(10.0)]
    assert allocate_ranks(squares, [1, 2], 2) == [0, 1]


def test_budget_edges() -> None:
    squares = [_sigma(4, 1, 0), _sigma(2)]
    assert allocate_ranks(squares, [3, 5], 100) == [2, 1]  # zeros are not bought
    assert allocate_ranks(squares, [3, 5], 0) == [0, 0]
    assert allocate_ranks(squares, [3, 5], -1) == [0, 0]
    assert allocate_ranks([], [], 10) == []


@pytest.mark.parametrize("kind", ["common", "odd"])
def test_budget_of_a_thousand_modules(kind: str) -> None:
    """Common shapes and costs without a common divisor; a bound on the cost of the search."""
    rng = random.Random(1)
    sizes = (
        [8192, 5120, 18432] if kind == "common" else [rng.randint(999, 20000) for _ in range(12)]
    )
    generator = torch.Generator().manual_seed(0)
    squares = [
        torch.rand(128, generator=generator, dtype=torch.float64).pow(4).sort(descending=True)[0]
        for _ in range(1000)
    ]
    costs = [4 * sizes[i % len(sizes)] for i in range(1000)]
    budget = 3 * 128 * sum(costs) // 10 + 3
    start = time.process_time()
    ranks = allocate_ranks(squares, costs, budget)
    assert time.process_time() - start < 5
    spent = sum(k * c for k, c in zip(ranks, costs, strict=True))
    assert budget - min(costs) < spent <= budget


def _cost(costs: list[int], shares: list[int], ranks: tuple[int, ...] | list[int]) -> int:
    return sum(k * c + (h if k else 0) for k, c, h in zip(ranks, costs, shares, strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_budget_with_shares_equals_brute_force(seed: int) -> None:
    """What is there at all costs something: dropping a matrix competes with lower ranks."""
    rng = random.Random(seed)
    for _ in range(100):
        squares, costs, shares = [], [], []
        for _ in range(rng.randint(1, 5)):
            values = sorted((rng.random() ** 3 for _ in range(rng.randint(0, 4))), reverse=True)
            squares.append(torch.tensor(values, dtype=torch.float64))
            costs.append(rng.choice((1, 2, 3, 5, 7, 11)))
            shares.append(rng.randint(0, 9))

        cost = functools.partial(_cost, costs, shares)
        budget = rng.randint(0, cost([len(s) for s in squares]) + 2)
        best = max(
            _energy(squares, ranks)
            for ranks in itertools.product(*(range(len(s) + 1) for s in squares))
            if cost(ranks) <= budget
        )
        ranks = allocate_with_shares(squares, costs, shares, budget)
        assert cost(ranks) <= budget
        assert _energy(squares, ranks) == pytest.approx(best, rel=1e-14, abs=0)
