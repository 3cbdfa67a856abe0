"""AdaLoRA and DeLoRA: two factors with a number for each rank between them.

AdaLoRA (Zhang et al., arXiv 2303.10512): ΔW = scaling · lora_B diag(lora_E) lora_A.
DeLoRA (Bini et al., arXiv 2503.18225): ΔW = B diag(λ / (r ‖b_k‖ ‖a_k‖)) A diag(w), where w holds
the lengths of the base's columns.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from loratool.adapter import DeltaSpec
from loratool.delta.lowrank import Pair

_SHORTEST = 1e-4  # lengths of factors are no less in PEFT


def adalora_pairs(fields: Mapping[str, torch.Tensor], spec: DeltaSpec) -> list[Pair]:
    """lora_B · diag(lora_E) (out, r) and lora_A (r, in), float64."""
    lora_A, lora_B, middle = (fields[r].double() for r in ("lora_A", "lora_B", "lora_E"))
    return [(lora_B * middle.flatten(), lora_A)]


def delora_pairs(fields: Mapping[str, torch.Tensor], spec: DeltaSpec) -> list[Pair]:
    """B, columns at the learned strength (out, r), and A, columns scaled (r, in), float64."""
    right, left = fields["delora_A"].double(), fields["delora_B"].double()
    lengths = [
        torch.linalg.vector_norm(factor, dim=dim).clamp(min=_SHORTEST)
        for factor, dim in ((right, 1), (left, 0))
    ]
    strength = fields["delora_lambda"].double() / (len(right) * lengths[0] * lengths[1])
    return [(left * strength, right * fields["delora_w_norm"].double())]
