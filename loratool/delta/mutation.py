"""What loading an adapter first takes away from its base: PiSSA, OLoRA, KaSA."""

from __future__ import annotations

import torch

from loratool.adapter import DeltaSpec
from loratool.linalg import svd


def removed_part(spec: DeltaSpec, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The part of a base weight that training started without, as (rows, r) and (r, cols) float64.

    Args:
        spec: a delta whose ``base_change`` says how the part was found.
        weight: (rows, cols) as the base stores it.

    References:
        Meng et al. 2024 (arXiv 2404.02948); Büyükakyüz 2024 (arXiv 2406.01775);
        Wang et al. 2025 (arXiv 2412.06071).
    """
    if spec.base_change == "pissa":
        return svd.top_part(weight, spec.rank)
    if spec.base_change == "kasa":
        return svd.bottom_part(weight, spec.rank)
    left, right = svd.leading_qr(weight, spec.rank)
    return left * spec.scaling, right
