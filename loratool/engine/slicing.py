"""Ranks that a size budget decides: spend it over all modules, then cut their factors."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loratool.adapter import TensorData
from loratool.delta.lowrank import unpacked
from loratool.engine.buffers import TORCH_DTYPES, from_bytes
from loratool.engine.difference import DifferenceResult
from loratool.engine.factoring import as_stored
from loratool.engine.factors import overflows
from loratool.engine.step_args import SubtractAndFactorArgs
from loratool.frozen import replace
from loratool.linalg.fit import cast_square
from loratool.linalg.shares import allocate_with_shares


def spend(
    groups: Sequence[Sequence[DifferenceResult]], shares: Sequence[int], budget: int
) -> list[int]:
    """The ranks that leave out the least energy within a budget of bytes.

    Args:
        groups: modules that must have one rank lie in one group.
        shares: bytes of each group's part of the header.
        budget: bytes for all factors, and their part of the header.
    """
    squares, costs = [], []
    for group in groups:
        longest = max(len(r.spectrum) for r in group)
        joint = torch.zeros(longest, dtype=torch.float64)
        for one in group:
            joint[: len(one.spectrum)] += torch.tensor(one.spectrum, dtype=torch.float64)
        squares.append(joint)
        costs.append(sum(bytes_per_rank(one) for one in group))
    return allocate_with_shares(squares, costs, shares, budget)


def bytes_per_rank(result: DifferenceResult) -> int:
    """What one more rank of a module takes in the file."""
    assert result.factors is not None
    return sum(f.nbytes for f in result.factors) // result.rank


def cut(result: DifferenceResult, args: SubtractAndFactorArgs, rank: int) -> DifferenceResult:
    """A module's result at a lower rank.

    Args:
        result: with the error at every rank.
        args: of its step.
        rank: 0 drops the factors.
    """
    assert result.factors is not None
    rank = min(rank, result.rank)
    residual = (result.residual_squares[rank],)
    if rank == 0:
        return replace(result, rank=0, factors=None, residual_squares=residual, cast_square=0.0)
    lora_A, lora_B = _unpack(result.factors, args)
    lora_A, lora_B = lora_A[:, :rank], lora_B[:, :, :rank]
    gain = args.gain
    moved = sum(
        float(cast_square(B / gain, A, torch.float16)) for B, A in zip(lora_B, lora_A, strict=True)
    )
    return replace(
        result,
        rank=rank,
        residual_squares=residual,
        cast_square=moved,
        spectrum=result.spectrum[:rank],
        factors=as_stored(lora_A, lora_B, args, result.name),
    )


def stored_as(
    result: DifferenceResult, args: SubtractAndFactorArgs, dtype: str
) -> DifferenceResult:
    """A module's result with factors of another type, and with what rounding them moves.

    Args:
        result: with float32 factors; they stay where the type cannot hold them.
        args: of its step.
        dtype: safetensors name.
    """
    if result.factors is None:
        return result
    lora_A, lora_B = _unpack(result.factors, args)
    if overflows(lora_A, dtype) or overflows(lora_B, dtype):
        return result
    target = TORCH_DTYPES[dtype]
    moved = sum(float(cast_square(B, A, target)) for B, A in zip(lora_B, lora_A, strict=True))
    return replace(
        result, cast_square=0.0,
        residual_squares=(result.residual_squares[-1] + moved / args.gain**2,),
        factors=as_stored(lora_A, lora_B, args, result.name, dtype),
    )  # fmt: skip


def _unpack(
    factors: tuple[TensorData, TensorData], args: SubtractAndFactorArgs
) -> tuple[torch.Tensor, torch.Tensor]:
    """(E, r, in) and (E, out, r) of what `as_stored` packed."""
    stored_A, stored_B = (
        from_bytes(torch.frombuffer(bytearray(f.data), dtype=torch.uint8), "F32", f.shape)
        for f in factors
    )
    lora_B, lora_A = unpacked(stored_B, stored_A, experts=args.experts)
    return lora_A, lora_B
