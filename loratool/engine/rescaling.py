"""factor · ΔW: scaled tensors in a storage type, and what rounding them lost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from loratool.adapter import Adapter, DeltaSpec, Source, TensorRef
from loratool.delta.lowrank import oriented_factors
from loratool.engine.factors import make_data, overflows, round_once
from loratool.engine.kernel import Env
from loratool.linalg.concat import concat_factors, product_norm
from loratool.plan import DeltaPart


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
    adapter: Adapter, baked: Mapping[str, float], env: Env, dtype: str | None
) -> ScaledTensors:
    """Multiply tensors in float64 and round them once.

    Args:
        adapter: whose tensors.
        baked: key -> factor.
        env: for loading.
        dtype: storage type of every factor; None = each keeps its own.
    """
    made: dict[str, Source] = {}
    square = error = 0.0
    overflow = False
    for spec in adapter.specs:
        exact, stored = {}, {}
        for role, source in spec.fields.items():
            assert isinstance(source, TensorRef)
            target = dtype or source.dtype
            wide = env.load(source).double()
            exact[role] = wide * baked.get(source.name, 1.0)
            if source.name in baked or target != source.dtype:
                made[source.name] = make_data(source.name, exact[role], target)
                overflow = overflow or overflows(exact[role], target)
            stored[role] = round_once(exact[role], target).double()
        if any(s.name in made for s in spec.fields.values()):
            one, lost = _sizes(spec, exact, stored)
            square, error = square + one, error + lost
    return ScaledTensors(made, square, error, overflow)


def _sizes(
    spec: DeltaSpec, exact: Mapping[str, torch.Tensor], stored: Mapping[str, torch.Tensor]
) -> tuple[float, float]:
    """(‖ΔW‖², ‖ΔW' − ΔW‖²); of lora_B alone for a convolution in groups."""
    scaling = spec.scaling**2
    is_exact = all(torch.equal(stored[role], exact[role]) for role in exact)
    if "delta" in exact:
        difference = stored["delta"] - exact["delta"]
        return scaling * float(exact["delta"].square().sum()), scaling * float(
            difference.square().sum()
        )
    if exact["lora_A"].shape[0] != exact["lora_B"].shape[1] and spec.blocks is None:
        lora_B = exact["lora_B"]
        return float(lora_B.square().sum()), float((stored["lora_B"] - lora_B).square().sum())
    total = lost = 0.0
    for expert in range(spec.experts) if spec.experts else [None]:
        part = DeltaPart(spec, 1.0, expert=expert)
        lora_A, lora_B = oriented_factors(exact, part)
        new_A, new_B = oriented_factors(stored, part)
        total += product_norm(lora_B, lora_A) ** 2
        if is_exact:
            continue
        lost += product_norm(*concat_factors([(new_B, new_A, 1.0), (lora_B, lora_A, -1.0)])) ** 2
    return scaling * total, scaling * lost
