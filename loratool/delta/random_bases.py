"""RandLoRA (arXiv 2502.00987): random matrices that modules share, trained numbers between them.

ΔW = scaling · B' A', where B' and A' are the shared ones cut to size, every row of A' times numbers
of its own.  The rank is full.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from loratool.adapter import DeltaSpec
from loratool.delta.lowrank import Pair, thinnest


def pairs_of(fields: Mapping[str, torch.Tensor], spec: DeltaSpec) -> list[Pair]:
    """(out, r·n) and (r·n, in) in float64, or the matrix itself where that is thinner.

    Args:
        fields: randlora_A (r, 1, short), randlora_B (long, n, r), of the largest module;
            randlora_lambda (r, n), randlora_gamma (n, short).
        spec: bound.
    """
    A, B, weights, gamma = (fields[f"randlora_{name}"].double() for name in
                            ("A", "B", "lambda", "gamma"))  # fmt: skip
    out, (inner,) = spec.row.sizes(spec)
    count, short = gamma.shape
    right = (weights[:, :, None] * A[:, :, :short] * gamma).flatten(0, 1)  # (r·n, short)
    left = B[: max(out, inner), :count].flatten(1)  # (long, n·r)
    if short < inner:
        left, right = right.T, left.T
    return [(left, right) if left.shape[1] <= short else thinnest(left @ right)]
