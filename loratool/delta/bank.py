"""VB-LoRA: factors put together from the vectors of one bank (Li et al., arXiv 2405.15179).

Every piece of v numbers of a factor is a mixture of the ``top`` likeliest vectors: logits_A
(r, in/v, N), logits_B (out/v, r, N), bank (N, v).  A finished adapter may hold the numbers of
those vectors and their weights but the last, which is what is missing to 1.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from loratool.adapter import DeltaSpec
from loratool.delta.lowrank import Pair
from loratool.errors import BadFileError
from loratool.kinds_peft import TOP


def pairs_of(fields: Mapping[str, torch.Tensor], spec: DeltaSpec) -> list[Pair]:
    """(out, r) and (r, in), float64."""
    bank = fields["bank"].double()
    right, left = (bank_mixture(bank, fields, side, spec) for side in "AB")
    return [(left.transpose(1, 2).flatten(0, 1), right.flatten(1))]


def bank_mixture(
    bank: torch.Tensor, fields: Mapping[str, torch.Tensor], side: str, spec: DeltaSpec
) -> torch.Tensor:
    """The vectors of a factor, (…, v) float64."""
    if f"logits_{side}" in fields:
        best, indices = fields[f"logits_{side}"].topk(int(spec.settings[TOP]), dim=-1)
        weights = torch.softmax(best.double(), dim=-1)
    else:
        indices, known = fields[f"indices_{side}"].long(), fields[f"weights_{side}"].double()
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < len(bank):
            raise BadFileError(
                "LT-363", "the tensors of a module do not fit each other", key=spec.name,
                expected=f"vectors 0 to {len(bank) - 1} of the bank", got=f"indices_{side}",
            )  # fmt: skip
        weights = torch.cat([known, 1 - known.sum(-1, keepdim=True)], -1)
    return (weights.unsqueeze(-1) * bank[indices]).sum(-2)
