"""Σ weight·ΔW of several adapters: new factors, and what storing them lost."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from loratool.adapter import DeltaSpec
from loratool.delta.lowrank import Pair
from loratool.engine.factors import (
    load_pairs,
    overflows,
    pack_pairs,
    round_once,
)
from loratool.engine.kernel import Env
from loratool.frozen import Frozen
from loratool.linalg.concat import concat_factors, difference_square, product_norm
from loratool.linalg.product import product_svd, split_factors
from loratool.plan import DeltaPart

_CANCELLED = 1e-14  # of the terms' size: what is left of a sum that cancels in float64


class SummedModule(Frozen):
    """One module of the result.

    Attributes:
        spec: with its new tensors.
        square: ‖ΔW‖_F² of the exact sum; 0 where the terms cancel.
        error_square: ‖ΔW' − ΔW‖_F² of what is stored.
        overflow: float16 cannot hold it; the stored values mean nothing.
    """

    spec: DeltaSpec
    square: float
    error_square: float
    overflow: bool = False


def sum_factors(
    like: DeltaSpec,
    terms: Sequence[DeltaPart],
    env: Env,
    *,
    gain: float,
    alpha: int | None,
    rank: int | None,
    dtype: str,
) -> SummedModule:
    """Σ weight · scaling · lora_B @ lora_A as one pair of factors (one per expert).

    Args:
        like: name, layout and packing of the result.
        terms: with their weights.
        env: for loading.
        gain: what the reader multiplies the scaling by.
        alpha: of the result; None = its rank, so that the scaling is ``gain``.
        rank: truncate to the best approximation of this rank; None = concatenate.
        dtype: storage type.
    """
    per_term = [load_pairs(term.spec, env) for term in terms]
    scales = [term.weight * term.spec.scaling for term in terms]
    whole = [
        concat_factors([(*pair, c) for pair, c in zip(pairs, scales, strict=True)])
        for pairs in zip(*per_term, strict=True)
    ]  # exact up to float64, one per expert
    total = whole[0][1].shape[0]
    if rank is not None and rank < total:
        made = [_truncate(pair, rank, gain) for pair in whole]
        new_rank, scaling, new_alpha = rank, gain, float(rank)
    else:
        new_rank, new_alpha = total, float(total if alpha is None else alpha)
        scaling = gain * new_alpha / new_rank
        made = [
            concat_factors([(*pair, c / scaling) for pair, c in zip(pairs, scales, strict=True)])
            for pairs in zip(*per_term, strict=True)
        ]
    square, error = 0.0, 0.0
    for number, (exact, new) in enumerate(zip(whole, made, strict=True)):
        norm = product_norm(*exact)
        pairs = [one[number] for one in per_term]
        size = sum(abs(c) * product_norm(*p) for c, p in zip(scales, pairs, strict=True))
        if norm > _CANCELLED * size:
            square += norm**2
            error += _error(exact, new, scaling, dtype) ** 2
    spec = pack_pairs(like, made, dtype, rank=new_rank, alpha=new_alpha, scaling=scaling)
    return SummedModule(spec, square, error, any(overflows(t, dtype) for p in made for t in p))


def _truncate(pair: Pair, rank: int, gain: float) -> Pair:
    """The best approximation; zero columns where the matrix is smaller than the rank."""
    lora_B, lora_A = split_factors(*product_svd(*pair), rank)
    more = rank - lora_B.shape[1]
    pad = torch.nn.functional.pad
    return pad(lora_B / gain, (0, more)), pad(lora_A, (0, 0, 0, more))


def _error(exact: Pair, made: Pair, scaling: float, dtype: str) -> float:
    """‖scaling · round(B') round(A') − B A‖_F."""
    lora_B, lora_A = (round_once(t, dtype).double() for t in made)
    if lora_A.shape == exact[1].shape:
        return math.sqrt(difference_square((lora_B.mul_(scaling), lora_A), exact))
    return product_norm(*concat_factors([(lora_B, lora_A, scaling), (*exact, -1.0)]))
