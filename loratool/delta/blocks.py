"""GraLoRA and MiSS: changes laid out in blocks of the weight.

GraLoRA (Jung et al., arXiv 2505.20355): the weight is a grid of K × K blocks, and each is a product
of rank r/K: block (m, n) is (A_n[:, m-th part of r] · B_m[n-th part of r, :])ᵀ.
MiSS (Kang and Yin, arXiv 2409.15371): every r columns of the weight change alike.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from loratool.adapter import DeltaSpec
from loratool.delta.lowrank import Pair
from loratool.kinds_peft import SHORT


def grid_pairs(fields: Mapping[str, torch.Tensor], spec: DeltaSpec) -> list[Pair]:
    """(out, K·r) and (K·r, in), float64: r/K columns for every block; a LoRA beside it last."""
    # (K, in/K, r) and (K, r, out/K)
    right, left = fields["gralora_A"].double(), fields["gralora_B"].double()
    count, width, rank = right.shape
    height, part = left.shape[2], rank // count
    lefts = left.new_zeros(count, height, count, count, part)  # rows m; columns (m, n, k)
    rights = right.new_zeros(count, count, part, count, width)  # rows (m, n, k); columns n
    for m in range(count):
        # B_m (n, k, out/K) fills the rows of block row m; A_n (in/K, m, k) the columns of n
        lefts[m, :, m] = left[m].view(count, part, height).permute(2, 0, 1)
        for n in range(count):
            rights[m, n, :, n] = right[n].view(width, count, part)[:, m].T
    pair = (lefts.reshape(count * height, -1), rights.reshape(-1, count * width))
    if "gralora_A_general" not in fields:
        return [pair]
    return [(
        torch.cat([pair[0], fields["gralora_B_general"].double()], 1),
        torch.cat([pair[1], fields["gralora_A_general"].double()], 0),
    )]  # fmt: skip


def shard_pairs(fields: Mapping[str, torch.Tensor], spec: DeltaSpec) -> list[Pair]:
    """The block turned round (out, r), and ones where a column is the k-th of its r: (r, in)."""
    block = fields["miss_block"].double()
    rank, (out, inner) = len(block), (spec.row.sizes(spec)[0], spec.row.sizes(spec)[1][0])
    if spec.settings.get(SHORT):
        block = block.repeat(1, out // block.shape[1])
    ones = torch.arange(inner) % rank == torch.arange(rank)[:, None]
    return [(block.T, ones.double())]
