"""What loading an adapter first takes away from its base: PiSSA, OLoRA, KaSA."""

from __future__ import annotations

import torch

from loratool.adapter import DeltaSpec
from loratool.delta.lowrank import LowRank
from loratool.linalg import svd
from loratool.plan import DeltaPart


def removed_part(spec: DeltaSpec, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The part of a base weight that training started without, as (rows, r) and (r, cols) float64.

    Args:
        spec: a delta whose ``base_change`` says how the part was found.
        weight: (rows, cols) as the base stores it.

    References:
        Meng et al. 2024 (arXiv 2404.02948); Büyükakyüz 2024 (arXiv 2406.01775);
        Wang et al. 2025 (arXiv 2412.06071).
    """
    left, right = _PARTS[spec.base_change](weight, spec.rank)
    return (left * spec.scaling if spec.base_change == "olora" else left), right


_PARTS = {"pissa": svd.top_part, "kasa": svd.bottom_part, "olora": svd.leading_qr}


def removed_delta(part: DeltaPart, weight: torch.Tensor, dtype: torch.dtype) -> LowRank:
    """The same part as the change that loading makes, times the part's weight.

    Args:
        part: whose spec has a ``base_change``.
        weight: (rows, cols) as the base stores it.
        dtype: of the accumulator.
    """
    left, right = removed_part(part.spec, weight)
    made = LowRank((left * -part.weight).to(dtype), right.to(dtype))
    made.roundings += sum(weight.shape)  # of the decomposition, which is backward stable
    return made
