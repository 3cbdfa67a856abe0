"""Changes whose tensors multiply out to one pair of thin factors: built from the kind's `pairs`."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from loratool.adapter import DeltaSpec
from loratool.delta.base import Loaded
from loratool.delta.lowrank import LowRank, Pair, region_of
from loratool.kind import HEAD
from loratool.plugins import function_of


def paired_factors(fields: Mapping[str, torch.Tensor], spec: DeltaSpec) -> list[Pair]:
    """lora_B (out, r) and lora_A (r, in) in float64, of rows whose pairs lie side by side.

    Of each head the file has rows 0, d/2, 1, d/2 + 1 …, transformers 0, 1 … d - 1.
    """
    left, head = fields["paired_B"].double(), int(spec.settings[HEAD])
    rank = left.shape[1]
    sorted_ = left.view(-1, head // 2, 2, rank).transpose(1, 2).reshape(-1, rank)
    return [(sorted_, fields["lora_A"].double())]


def build(given: Loaded) -> LowRank:
    """Make the delta of a spec whose kind has `pairs`, one for its one matrix.

    Args:
        given: of the kind, as stored.
    """
    ((left, right),) = function_of(given.spec.row.pairs)(given.fields, given.spec)
    left, coefficient = given.folded(left)
    return region_of(left, right, given, coefficient)
