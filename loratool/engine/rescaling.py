"""factor · ΔW: scaled tensors in a storage type, and what rounding them lost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from loratool.adapter import Adapter, DeltaSpec, Source, TensorRef
from loratool.delta.forms import is_grouped
from loratool.dtypes import result_dtype
from loratool.engine.factors import make_data, make_pairs, overflows, round_once
from loratool.engine.kernel import Env
from loratool.engine.workers import map_in_workers
from loratool.linalg.concat import difference_square, product_norm


@dataclass(frozen=True)
class ScaledTensors:
    """New tensors of an adapter.

    Attributes:
        tensors: key -> new tensor; keys that are not here stay as they are.
        square: Σ‖factor·ΔW‖² over all modules.
        error_square: Σ‖stored − factor·ΔW‖².
        overflow: float16 cannot hold a value; the tensors mean nothing.
    """

    tensors: Mapping[str, Source]
    square: float
    error_square: float
    overflow: bool


def scale_tensors(
    adapter: Adapter, baked: Mapping[str, float], env: Env, dtype: str | None, threads: int
) -> ScaledTensors:
    """Multiply tensors in float64 and round them once.

    Args:
        adapter: whose tensors.
        baked: key -> factor.
        env: for loading.
        dtype: storage type of every factor; None = each keeps its own.
        threads: workers, each with one module at a time.
    """
    parts = map_in_workers(
        lambda spec: _scale_module(spec, baked, env, dtype), adapter.specs, threads
    )
    return ScaledTensors(
        {key: source for part in parts for key, source in part.tensors.items()},
        sum(part.square for part in parts),
        sum(part.error_square for part in parts),
        any(part.overflow for part in parts),
    )


def _scale_module(
    spec: DeltaSpec, baked: Mapping[str, float], env: Env, dtype: str | None
) -> ScaledTensors:
    made: dict[str, Source] = {}
    exact, stored = {}, {}
    overflow = False
    for role, source in spec.fields.items():
        assert isinstance(source, TensorRef)
        factor = baked.get(source.name)
        target = dtype or (source.dtype if factor is None else result_dtype(source.dtype))
        exact[role] = stored[role] = env.load(source).double()
        if factor is not None:
            exact[role] *= factor
        if factor is not None or target != source.dtype:
            made[source.name] = make_data(source.name, exact[role], target)
            overflow = overflow or overflows(exact[role], target)
            stored[role] = round_once(exact[role], target).double()
    square, error = _sizes(spec, exact, stored) if made else (0.0, 0.0)
    return ScaledTensors(made, square, error, overflow)


def _sizes(
    spec: DeltaSpec, exact: Mapping[str, torch.Tensor], stored: Mapping[str, torch.Tensor]
) -> tuple[float, float]:
    """(‖ΔW‖², ‖ΔW' − ΔW‖²); of lora_B alone for a convolution in groups."""
    scaling = spec.scaling**2
    is_exact = all(torch.equal(stored[role], exact[role]) for role in exact)
    if not spec.is_matrix or is_grouped(spec):  # of the left factor alone
        role = spec.row.scaled
        size = 1.0 if spec.is_matrix else scaling
        difference = stored[role] - exact[role]
        return size * float(exact[role].square().sum()), size * float(difference.square().sum())
    total = lost = 0.0
    for old, new in zip(make_pairs(exact, spec), make_pairs(stored, spec), strict=True):
        total += product_norm(*old) ** 2
        lost += 0.0 if is_exact else difference_square(new, old)
    return scaling * total, scaling * lost
