"""Factors of additive modules in and out of their stored form: one pair per matrix, float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from loratool.adapter import DeltaSpec, TensorData
from loratool.delta.forms import kernel_of, values_of, with_factors
from loratool.delta.lowrank import Pair, packed
from loratool.engine.buffers import TORCH_DTYPES, to_bytes
from loratool.engine.kernel import Env
from loratool.linalg.rounding import round_into
from loratool.plugins import function_of

FP16_MAX = 65504.0
FP16_ROUNDED = 1.01 * 2.0**-10
"""Relative error of a product whose factors were rounded to normal float16 numbers: 2u + u² at
most, u = 2⁻¹¹ (docs/exactness.md).  More means that values fell below 2⁻¹⁴ and lost digits."""

_PIECE = 1 << 18


def load_pairs(spec: DeltaSpec, env: Env) -> list[Pair]:
    """The thin factors behind a change: one pair, or one per expert; scaling left out.

    A diagonal between the factors is folded into lora_B, block-diagonal factors are laid out.

    Raises:
        NumericError: NaN or infinity.
    """
    fields = {role: env.load(source) for role, source in spec.fields.items()}
    return make_pairs(fields, spec)


def make_pairs(fields: Mapping[str, torch.Tensor], spec: DeltaSpec) -> list[Pair]:
    """As `load_pairs`, of loaded tensors."""
    made: list[Pair] = function_of(spec.row.pairs)(fields, spec)
    return made


def load_vector(spec: DeltaSpec, env: Env) -> torch.Tensor:
    """A bias delta (n,) in float64, scaling left out."""
    return env.load(values_of(spec)).double().flatten()


def padded(factor: torch.Tensor, rank: int, axis: int) -> torch.Tensor:
    """With zeros up to ``rank``: one rank may have to serve matrices of several shapes."""
    missing = rank - factor.shape[axis]
    if missing <= 0:
        return factor
    shape = list(factor.shape)
    shape[axis] = missing
    return torch.cat([factor, factor.new_zeros(shape)], axis)


def pack_pairs(spec: DeltaSpec, pairs: Sequence[Pair], dtype: str, **changes: Any) -> DeltaSpec:
    """The change with these factors instead of its own (`load_pairs` turned round).

    Args:
        spec: whose layout, packing and kernel count.
        pairs: one, or one per expert, of equal rank.
        dtype: safetensors name.
        changes: other fields of the spec, such as rank and scaling.
    """
    lora_B = torch.stack([one for one, _ in pairs])  # (E, out, r)
    lora_A = torch.stack([one for _, one in pairs])  # (E, r, in)
    kernel = kernel_of(spec) if spec.layout == "conv" else ()
    left, right = packed(lora_B, lora_A, experts=spec.experts, kernel=kernel)
    return with_factors(
        spec, make_data(f"{spec.name} lora_B", left, dtype),
        make_data(f"{spec.name} lora_A", right, dtype), **changes,
    )  # fmt: skip


def make_data(name: str, tensor: torch.Tensor, dtype: str) -> TensorData:
    """A tensor rounded to a storage type."""
    stored = round_once(tensor, dtype)
    return TensorData(name, dtype, tuple(stored.shape), bytes(to_bytes(stored)))


def round_once(tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    """The values that a storage type keeps, to nearest, ties to even."""
    out = torch.empty_like(tensor, dtype=TORCH_DTYPES[dtype], memory_format=torch.contiguous_format)
    flat, values = out.view(-1), tensor.contiguous().view(-1)
    for start in range(0, len(flat), _PIECE):  # each takes temporaries of its size
        round_into(flat[start : start + _PIECE], values[start : start + _PIECE])
    return out


def overflows(tensor: torch.Tensor, dtype: str) -> bool:
    """True if float16 cannot hold the largest element."""
    if dtype != "F16" or not tensor.numel():
        return False
    low, high = tensor.aminmax()
    return max(-float(low), float(high)) > FP16_MAX
