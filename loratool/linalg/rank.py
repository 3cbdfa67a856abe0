"""stub until compress lands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RankRule:
    rank: int | None = None
    energy: float | None = None
    error: float | None = None
    sv_ratio: float | None = None
    cumulative: float | None = None
    absolute: float | None = None
    base_ratio: float | None = None
    max_rank: int | None = None


def choose_rank(
    sigma: torch.Tensor,
    rule: RankRule,
    *,
    total_square: float | None = None,
    base_norm: float | None = None,
) -> int:
    k = len(sigma)
    total = total_square if total_square is not None else float(sigma.square().sum())
    for r in (rule.rank, rule.max_rank):
        if r is not None:
            k = min(k, r)
    energy = rule.energy
    if rule.error is not None:
        e = 1 - rule.error**2
        energy = e if energy is None else min(e, energy)
    if energy is not None:
        cum = torch.cat([torch.zeros(1, dtype=torch.float64), sigma.cpu().square().cumsum(0)])
        hit = (cum >= energy * total).nonzero()
        if len(hit):
            k = min(k, int(hit[0]))
    return k


def allocate_ranks(squares: Sequence[torch.Tensor], costs: Sequence[int], budget: int) -> list[int]:
    out = [0] * len(squares)
    items = sorted(
        ((-float(s) / c, i) for i, (sq, c) in enumerate(zip(squares, costs)) for s in sq)
    )
    for _, i in items:
        if budget >= costs[i]:
            out[i] += 1
            budget -= costs[i]
    return out
