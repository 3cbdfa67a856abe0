"""factor · ΔW: scaled tensors in a storage type, and what rounding them lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from loratool.adapter import DeltaSpec, Source
from loratool.delta.forms import is_grouped
from loratool.engine.factors import FP16_ROUNDED, make_data, make_pairs, overflows, round_once
from loratool.engine.kernel import Env
from loratool.engine.step_args import ScaleArgs
from loratool.frozen import Frozen
from loratool.linalg.concat import difference_square, product_norm


class ScaledTensors(Frozen):
    """New tensors of an adapter.

    Attributes:
        tensors: key -> new tensor; keys that are not here stay as they are.
        square: Σ‖factor·ΔW‖² over all modules.
        error_square: Σ‖stored − factor·ΔW‖².
        overflow: float16 cannot hold a value, or the digits of small ones where nobody asked for
            it; other tensors are to be made.
    """

    tensors: Mapping[str, Source]
    square: float
    error_square: float
    overflow: bool


def join_scaled(parts: Sequence[ScaledTensors]) -> ScaledTensors:
    """Several modules' as one."""
    return ScaledTensors(
        {key: source for part in parts for key, source in part.tensors.items()},
        sum(part.square for part in parts),
        sum(part.error_square for part in parts),
        any(part.overflow for part in parts),
    )


def scale_module(spec: DeltaSpec, args: ScaleArgs, env: Env) -> ScaledTensors:
    """Multiply tensors of one module in float64 and round them once."""
    made: dict[str, Source] = {}
    exact, stored = {}, {}
    overflow = False
    for role, source in spec.fields.items():
        target = args.target(source)
        exact[role] = stored[role] = env.load(source).double()
        if source.name in args.factors:
            exact[role] *= args.factors[source.name]
        if target is not None:
            made[source.name] = make_data(source.name, exact[role], target)
            overflow = overflow or overflows(exact[role], target)
            stored[role] = round_once(exact[role], target).double()
    square, error = sizes(spec, exact, stored) if made else (0.0, 0.0)
    is_own = args.dtype is None and any(s.dtype == "F16" for s in spec.fields.values())
    overflow = overflow or (is_own and error > FP16_ROUNDED**2 * square)
    return ScaledTensors(made, square, error, overflow)


def sizes(
    spec: DeltaSpec, exact: Mapping[str, torch.Tensor], stored: Mapping[str, torch.Tensor]
) -> tuple[float, float]:
    """(‖ΔW‖², ‖ΔW' − ΔW‖²); of the left factor alone where the factors are no pair.

    Args:
        spec: a change.
        exact: role -> its tensor in float64.
        stored: the same as it is stored.
    """
    scaling = spec.scaling**2
    is_exact = all(torch.equal(stored[role], exact[role]) for role in exact)
    if not spec.is_matrix or is_grouped(spec) or spec.is_open or not spec.row.has_factors:
        role = spec.row.scaled
        size = 1.0 if spec.is_matrix else scaling
        difference = stored[role] - exact[role]
        return size * float(exact[role].square().sum()), size * float(difference.square().sum())
    total = lost = 0.0
    for old, new in zip(make_pairs(exact, spec), make_pairs(stored, spec), strict=True):
        total += product_norm(*old) ** 2
        lost += 0.0 if is_exact else difference_square(new, old)
    return scaling * total, scaling * lost
