"""How many singular values to keep: rules for one matrix, and a budget shared by many."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from loratool.frozen import Frozen

_SLACK = 2.0**-40
"""Relative distance at which a threshold counts as reached: computed singular values that meet
one exactly in real numbers miss it by rounding, a few 2⁻⁵² of it."""

_ROUNDING = 2.0**-52

_FIRST_GUESS, _GROWTH = 4096.0, 8.0
"""Where the search for the best sum starts, as a part of the gap, and how fast it widens."""

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


class RankRule(Frozen):
    """Conditions on the singular values σ₁ ≥ σ₂ ≥ … ≥ 0 of a matrix; None leaves one out.

    Each condition gives the number k of values kept; the smallest k wins.  E(k) = Σ_{i≤k} σᵢ².

    Attributes:
        rank: k = rank.
        energy: in [0, 1]; the smallest k with E(k) ≥ energy · ‖D‖_F².
        error: in [0, 1]; the smallest k with ‖D - D_k‖_F ≤ error · ‖D‖_F.
        sv_ratio: >= 1; the number of values with σᵢ ≥ σ₁ / sv_ratio.
        sv_sum: in [0, 1]; the smallest k with Σ_{i≤k} σᵢ ≥ sv_sum · Σ σᵢ; of all values alone.
        sv_min: >= 0; the number of values with σᵢ ≥ sv_min.
        sv_base: >= 0; the number of values with σᵢ ≥ sv_base · ``base_norm``.
        max_rank: an upper limit, whatever the other conditions give.
    """

    rank: int | None = None
    energy: float | None = None
    error: float | None = None
    sv_ratio: float | None = None
    sv_sum: float | None = None
    sv_min: float | None = None
    sv_base: float | None = None
    max_rank: int | None = None


def choose_rank(
    sigma: torch.Tensor,
    rule: RankRule,
    *,
    total_square: float | None = None,
    base_norm: float | None = None,
) -> int:
    """The number of singular values that a rule keeps.

    Values up to n·2⁻⁵²·σ₁ (n of them) are rounding of zeros and never kept: a matrix of rank 2
    is compressed to rank 2 at most, a zero matrix to rank 0.

    Args:
        sigma: (n,) descending, >= 0; all singular values, or the leading ones.
        rule: conditions.
        total_square: ‖D‖_F² where ``sigma`` holds only the leading values; None = Σσ².
        base_norm: what ``sv_base`` refers to, such as ‖W‖₂ of the base weight.

    Returns:
        k in 0 … n; n where not even all known values reach an energy or an error.

    Raises:
        ValueError: a ``sv_base`` without ``base_norm``.
    """
    values = sigma.detach().cpu().double().numpy()
    largest = float(values[0]) if len(values) else 0.0
    count = int((values > len(values) * _ROUNDING * largest).sum())
    values = values[:count]
    limits = [count]
    limits += [k for k in (rule.rank, rule.max_rank) if k is not None]
    square = values**2
    unknown = 0.0 if total_square is None else max(0.0, total_square - math.fsum(square))
    if rule.energy is not None:
        limits.append(_shortest_head(square, unknown, 1 - rule.energy))
    if rule.error is not None:
        limits.append(_shortest_head(square, unknown, rule.error**2))
    if rule.sv_sum is not None:
        limits.append(_shortest_head(values, 0.0, 1 - rule.sv_sum))
    floors = []
    if rule.sv_ratio is not None:
        floors.append(largest / rule.sv_ratio)
    if rule.sv_min is not None:
        floors.append(rule.sv_min)
    if rule.sv_base is not None:
        if base_norm is None:
            raise ValueError("sv_base needs base_norm")
        floors.append(rule.sv_base * base_norm)
    limits += [int((values >= floor * (1 - _SLACK)).sum()) for floor in floors]
    return max(0, min(limits))


def _shortest_head(terms: Floats, unknown: float, share: float) -> int:
    """The smallest k with Σ_{i>k} terms + unknown ≤ share · (Σ terms + unknown)."""
    tails = np.append(np.cumsum(terms[::-1])[::-1], 0.0) + unknown  # (n + 1,) descending
    fits = tails <= share * float(tails[0]) * (1 + _SLACK)
    return int(np.argmax(fits)) if fits.any() else len(terms)


def allocate_ranks(squares: Sequence[torch.Tensor], costs: Sequence[int], budget: int) -> list[int]:
    """Spend a budget on singular values of many matrices so that the most energy is kept.

    Maximises Σ_m Σ_{i ≤ k_m} squares[m][i] subject to Σ_m costs[m] · k_m ≤ budget, exactly.

    Args:
        squares: per matrix σ², descending, >= 0.
        costs: per matrix what one unit of rank costs, > 0.
        budget: what may be spent.

    Returns:
        k_m per matrix; zeros (σ² = 0) are never bought.

    Notes:
        Matrices of one cost share one sorted list, of which the largest n are taken.  What n
        gains is concave in n, so that the best counts lie near those of the relaxed problem:
        Lagrange's bound leaves a window in each list, and the windows are combined by max-plus
        convolution that keeps undominated (spent, gained) pairs only.
    """
    groups = _Groups(squares, costs)
    taken = _solve(groups.gains, groups.costs, budget) if budget >= 0 else None
    ranks = [0] * len(squares)
    for members, count in zip(groups.members, taken or [0] * len(groups.members), strict=True):
        for matrix, times in zip(*np.unique(members[:count], return_counts=True), strict=True):
            ranks[int(matrix)] = int(times)
    return ranks


class _Groups:
    """Matrices of one cost per rank: all their σ² as one descending list, and its sums."""

    def __init__(self, squares: Sequence[torch.Tensor], costs: Sequence[int]) -> None:
        self.costs = sorted(set(costs))
        self.members: list[Integers] = []  # whose value each place of the list is
        self.gains: list[Floats] = []  # sums of the first 0, 1, 2 … places
        for cost in self.costs:
            mine = [m for m, c in enumerate(costs) if c == cost]
            values = [squares[m].detach().cpu().double().numpy() for m in mine]
            values = [v[v > 0] for v in values]
            joined = np.concatenate(values) if values else np.zeros(0)
            owners = np.repeat(np.array(mine, dtype=np.int64), [len(v) for v in values])
            order = np.argsort(-joined, kind="stable")
            self.members.append(owners[order])
            self.gains.append(np.concatenate([[0.0], np.cumsum(joined[order])]))


def _solve(gains: Sequence[Floats], costs: Sequence[int], budget: int) -> list[int]:
    """The counts n_g that maximise Σ gains[g][n_g] with Σ costs[g] · n_g ≤ budget."""
    whole = [len(g) - 1 for g in gains]
    if sum(c * n for c, n in zip(costs, whole, strict=True)) <= budget:
        return whole
    price, taken = _relax(gains, costs, budget)
    best = _fill(gains, costs, budget, taken)
    value = sum(float(g[n]) for g, n in zip(gains, best, strict=True))
    # What each count loses against the price's own choice; losses add up over the lists.
    losses, bound = [], price * budget
    for gain, cost in zip(gains, costs, strict=True):
        net = gain - price * cost * np.arange(len(gain))
        losses.append(net.max() - net)
        bound += float(net.max())
    reach = _reach(costs)
    near = [abs(np.arange(len(g)) - n) <= reach for g, n in zip(gains, taken, strict=True)]
    rounding = 1e-14 * abs(bound)
    limit = gap = bound - value + rounding  # the best sum loses no more than this
    limit /= _FIRST_GUESS
    while True:  # a sum that loses less than the limit it was sought under is the best one
        limit = min(limit, gap)
        windows = [np.flatnonzero((x <= limit) & n) for x, n in zip(losses, near, strict=True)]
        found = _combine(gains, costs, budget, windows, losses, limit)
        if found is not None:
            kept = sum(float(g[n]) for g, n in zip(gains, found, strict=True))
            if kept > value:
                best, value = found, kept
                gap = bound - value + rounding
        if gap <= limit:
            return best
        limit *= _GROWTH


def _relax(gains: Sequence[Floats], costs: Sequence[int], budget: int) -> tuple[float, list[int]]:
    """Price per unit of cost at which the budget is used up, and the counts bought before it."""
    rates = np.concatenate([np.diff(g) / c for g, c in zip(gains, costs, strict=True)])
    owner = np.repeat(np.arange(len(costs)), [len(g) - 1 for g in gains])
    order = np.argsort(-rates, kind="stable")
    spent = np.cumsum(np.array(costs, dtype=np.int64)[owner[order]])
    last = int(np.searchsorted(spent, budget, side="right"))  # the first that does not fit
    counts = np.bincount(owner[order[:last]], minlength=len(costs))
    return float(rates[order[last]]), [int(n) for n in counts]


def _fill(
    gains: Sequence[Floats], costs: Sequence[int], budget: int, taken: Sequence[int]
) -> list[int]:
    """Counts with what still fits bought, best rate first: a lower bound."""
    counts = list(taken)
    left = budget - sum(c * n for c, n in zip(costs, counts, strict=True))
    while True:
        open_ = [
            (float(g[n + 1] - g[n]) / c, i)
            for i, (g, c, n) in enumerate(zip(gains, costs, counts, strict=True))
            if n + 1 < len(g) and c <= left
        ]
        if not open_:
            return counts
        chosen = max(open_)[1]
        counts[chosen] += 1
        left -= costs[chosen]


def _reach(costs: Sequence[int]) -> int:
    """How far optimal counts can lie from relaxed ones (Hochbaum & Shanthikumar 1990, thm. 3.2).

    The bound for one constraint is (number of lists) · (largest coefficient), coefficients
    freed of their common divisor; one more for the count that the relaxed problem cuts.
    """
    return len(costs) * (max(costs) // math.gcd(*costs)) + 1


def _combine(
    gains: Sequence[Floats],
    costs: Sequence[int],
    budget: int,
    windows: Sequence[Integers],
    losses: Sequence[Floats],
    gap: float,
) -> list[int] | None:
    """Max-plus convolution of the windows; the counts of the best sum within the budget."""
    if not all(map(len, windows)):
        return None
    spent, gained, lost = np.zeros(1, np.int64), np.zeros(1), np.zeros(1)
    cheapest = [int(c * w[0]) for c, w in zip(costs, windows, strict=True)]
    trail: list[tuple[Integers, Integers]] = []
    for place, (gain, cost, window) in enumerate(zip(gains, costs, windows, strict=True)):
        rest = budget - sum(cheapest[place + 1 :])
        sums = (spent[:, None] + cost * window).ravel()
        totals = (gained[:, None] + gain[window]).ravel()
        loss = (lost[:, None] + losses[place][window]).ravel()
        alive = np.flatnonzero((loss <= gap) & (sums <= rest))
        order = alive[np.lexsort((-totals[alive], sums[alive]))]
        running = np.maximum.accumulate(totals[order]) if len(order) else totals[:0]
        front = np.append(True, running[1:] > running[:-1])[: len(order)]
        keep = order[front]
        trail.append((keep // len(window), window[keep % len(window)]))
        spent, gained, lost = sums[keep], totals[keep], loss[keep]
        if not len(keep):
            return None
    at = len(spent) - 1  # the front ascends in both
    counts = []
    for parent, chosen in reversed(trail):
        counts.append(int(chosen[at]))
        at = int(parent[at])
    return counts[::-1]
