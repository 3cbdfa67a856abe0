"""RandLoRA (arXiv 2502.00987): random matrices that modules share, trained numbers between them.

ΔW = scaling · B' A', where B' and A' are the shared ones cut to size, every row of A' times numbers
of its own.  The rank is full.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from loratool.adapter import DeltaSpec
from loratool.delta.lowrank import Pair, thinnest
from loratool.kinds import SPARSE, drawn_sides
from loratool.kinds_peft import SEED


def pairs_of(fields: Mapping[str, torch.Tensor], spec: DeltaSpec) -> list[Pair]:
    """(out, r·n) and (r·n, in) in float64, or the matrix itself where that is thinner.

    Args:
        fields: randlora_A (r, 1, short), randlora_B (long, n, r), of the largest module, both or
            none; randlora_lambda (r, n), randlora_gamma (n, short).
        spec: bound.
    """
    weights, gamma = (fields[f"randlora_{name}"].double() for name in ("lambda", "gamma"))
    if "randlora_A" in fields:
        A, B = fields["randlora_A"], fields["randlora_B"]
    else:
        A, B = _drawn(spec, weights.shape[0])
    out, (inner,) = spec.row.sizes(spec)
    count, short = gamma.shape
    right = (weights[:, :, None] * A[:, :, :short].double() * gamma).flatten(0, 1)  # (r·n, short)
    left = B[: max(out, inner), :count].double().flatten(1)  # (long, n·r)
    if short < inner:
        left, right = right.T, left.T
    return [(left, right) if left.shape[1] <= short else thinnest(left @ right)]


def _drawn(spec: DeltaSpec, r: int) -> Pair:
    """A (r, 1, short) and B (long, n, r) as PEFT draws them, over their standard deviation.

    On the CPU; in bfloat16 (float16 where PEFT finds none: Macs before macOS 14), or -1, 0 and 1 of
    uniform numbers in float32.
    """
    generator = torch.Generator().manual_seed(int(spec.settings[SEED]))
    short, long, count = drawn_sides(spec)
    sparse = int(spec.settings[SPARSE])
    if not sparse:
        A = _uniform((r, 1, short), generator)
        B = torch.cat([_uniform((long, 1, r), generator) for _ in range(count)], dim=1)
    else:
        share = 1 / (2 * (3 if sparse == 1 else math.sqrt(short)))
        shapes = ((r, 1, short), (long, count, r))
        A, B = (_signs(torch.rand(shape, generator=generator), share) for shape in shapes)
    return A / A.std(), B / B.std()


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    drawn = torch.empty(shape, dtype=torch.bfloat16)
    return torch.nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)


def _signs(drawn: torch.Tensor, share: float) -> torch.Tensor:
    """-1 for the lowest share, 1 for the highest, 0 for the rest."""
    return (drawn > 1 - share).float() - (drawn < share).float()
