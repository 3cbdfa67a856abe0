"""Changes whose tensors multiply out to one pair of thin factors: built from the kind's `pairs`."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from loratool.adapter import DeltaSpec
from loratool.delta.lowrank import LowRank, Pair, region_of
from loratool.kind import HEAD
from loratool.plan import DeltaPart
from loratool.plugins import function_of


def paired_factors(fields: Mapping[str, torch.Tensor], spec: DeltaSpec) -> list[Pair]:
    """lora_B (out, r) and lora_A (r, in) in float64, of rows whose pairs lie side by side.

    Of each head the file has rows 0, d/2, 1, d/2 + 1 …, transformers 0, 1 … d - 1.
    """
    left, head = fields["paired_B"].double(), int(spec.settings[HEAD])
    rank = left.shape[1]
    sorted_ = left.view(-1, head // 2, 2, rank).transpose(1, 2).reshape(-1, rank)
    return [(sorted_, fields["lora_A"].double())]


def build(
    fields: Mapping[str, torch.Tensor],
    part: DeltaPart,
    *,
    coefficient: float,
    dtype: torch.dtype,
    fold: bool = True,
) -> LowRank:
    """Make the delta of a spec whose kind has `pairs`, one for its one matrix.

    Args:
        fields: of the kind, as stored.
        part: the spec with orientation and region.
        coefficient: weight · scaling, float64, folded into the left factor before it is rounded.
        dtype: float32 or float64, the type of the accumulator.
        fold: False keeps the coefficient apart.
    """
    ((left, right),) = function_of(part.spec.row.pairs)(fields, part.spec)
    if fold:
        left, coefficient = left * coefficient, 1.0
    return region_of(left, right, part, dtype, coefficient)
