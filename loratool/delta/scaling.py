"""Factors of a change times a number, in memory: computed in float64, rounded once."""

from __future__ import annotations

import torch

from loratool.adapter import Source, TensorData
from loratool.dtypes import exact_dtype
from loratool.errors import BadFileError
from loratool.linalg.rounding import round_into
from loratool.store.reader import read_bytes

_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip


def remade(source: Source, factor: float, dtype: str) -> TensorData:
    """A tensor times a factor.

    Args:
        source: F16, BF16, F32 or F64.
        factor: exact in float64.
        dtype: of the result, one of the same types.

    Raises:
        BadFileError: LT-333, another type.
    """
    return _stored(source, _wide(source) * factor, dtype)


def folded(source: Source, factor: float) -> TensorData:
    """The same in the tensor's own type where that loses nothing, else in float32 or float64."""
    exact = _wide(source) * factor
    stored = torch.empty_like(exact, dtype=_TYPES[source.dtype])
    round_into(stored, exact)
    is_exact = torch.equal(stored.double(), exact)
    return _stored(source, exact, source.dtype if is_exact else exact_dtype([source.dtype]))


def _wide(source: Source) -> torch.Tensor:
    if source.dtype not in _TYPES:
        raise BadFileError(
            "LT-333", "tensor of this type cannot be computed with", key=source.name,
            expected=", ".join(_TYPES), got=source.dtype,
        )  # fmt: skip
    raw = torch.frombuffer(bytearray(read_bytes(source)), dtype=torch.uint8)
    return raw.view(_TYPES[source.dtype]).view(source.shape).double()


def _stored(source: Source, value: torch.Tensor, dtype: str) -> TensorData:
    out = torch.empty_like(value, dtype=_TYPES[dtype])
    round_into(out, value)
    data = bytes(out.flatten().view(torch.uint8).numpy())
    return TensorData(source.name, dtype, tuple(value.shape), data)
