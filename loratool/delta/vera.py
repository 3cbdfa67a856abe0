"""VeRA and PVeRA: random matrices that all modules share, and what each scales them with.

VeRA (Kopiczko et al., arXiv 2310.11454): ΔW = diag(b) B[:out] diag(d) A[:, :in].  Of PVeRA, which
learns a mean and a variance of the middle, the means are the first half of d and of A's rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from loratool.adapter import DeltaSpec
from loratool.delta.lowrank import Pair
from loratool.kinds_peft import SEED, TALLEST, WIDEST


def pairs_of(fields: Mapping[str, torch.Tensor], spec: DeltaSpec) -> list[Pair]:
    """diag(b) B diag(d) (out, r) and A (r, in), float64."""
    out, inner = spec.row.sizes(spec)
    d = fields["lambda_d"].double()
    if "shared_A" in fields:
        right, left = fields["shared_A"], fields["shared_B"]
    else:
        right, left = _drawn(spec, len(d))
    rank = left.shape[1]
    left = left[:out].double() * fields["lambda_b"].double()[:, None] * d[:rank]
    return [(left, right[:rank, : inner[0]].double())]


def _drawn(spec: DeltaSpec, height: int) -> Pair:
    """A (height, widest) and B (tallest, r) as PEFT draws them: A first, on the CPU, in float32."""
    generator = torch.Generator().manual_seed(int(spec.settings[SEED]))
    made = []
    for shape in ((height, int(spec.settings[WIDEST])), (int(spec.settings[TALLEST]), spec.rank)):
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1]))
        drawn = torch.empty(shape, dtype=torch.float32)
        made.append(drawn.uniform_(-bound, bound, generator=generator))
    return made[0], made[1]
