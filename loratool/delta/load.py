"""A change with its tensors, whatever its kind."""

from __future__ import annotations

from collections.abc import Callable

import torch

from loratool.adapter import Source
from loratool.delta.base import Delta, Loaded
from loratool.delta.mutation import Moved
from loratool.plan import DeltaPart
from loratool.plugins import function_of


def load_delta(
    part: DeltaPart,
    load: Callable[[Source], torch.Tensor],
    *,
    coefficient: float,
    dtype: torch.dtype,
    fold: bool = True,
) -> Delta:
    """Build the delta of a part.

    Args:
        part: the spec with orientation, region and expert.
        load: gives a tensor as stored.
        coefficient: of the change, scaling included.
        dtype: float32 or float64, the type of the accumulator.
        fold: False keeps tensors as stored and the coefficient apart.
    """
    build: Callable[[Loaded], Delta] = function_of(part.spec.row.implementation)
    fields = {role: load(source) for role, source in part.spec.fields.items()}
    made = build(Loaded(fields, part, coefficient, dtype, fold))
    is_inside = part.spec.scales_rows or not part.spec.base_change  # of the norm that DoRA takes
    return made if is_inside else Moved(made, part, dtype)
