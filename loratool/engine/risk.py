"""Statistics of single modules for `inspect --risk`, and intruder dimensions against a base."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from loratool.adapter import DeltaSpec
from loratool.delta.forms import left_of
from loratool.delta.load import load_delta
from loratool.delta.lowrank import LowRank
from loratool.engine.comparison import scaled_pairs
from loratool.engine.detaching import load_region
from loratool.engine.factors import load_vector, pack_pairs
from loratool.engine.grid import SAMPLE_ELEMENTS
from loratool.engine.kernel import Env
from loratool.frozen import Frozen, replace
from loratool.linalg.concat import concat_factors, product_norm
from loratool.linalg.intruders import Intruders, find_intruders, weakened
from loratool.linalg.product import product_spectrum, product_svd, split_factors
from loratool.plan import DeltaPart, Place


class ModuleStatistics(Frozen):
    """Numbers of one ΔW (of all experts together).

    Attributes:
        norm: ‖ΔW‖_F.
        sigma_1: largest singular value.
        concentration: σ₁² / Σσ².
        entropy: of the energies p = σ²/Σσ², −Σ p ln p / ln r: 0 = one direction, 1 = all alike.
        kurtosis: of the elements, E(x − x̄)⁴ / (E(x − x̄)²)²; 3 for a normal distribution.
        sampled: elements that the kurtosis was computed on.
    """

    norm: float
    sigma_1: float
    concentration: float
    entropy: float
    kurtosis: float
    sampled: int


def measure_module(spec: DeltaSpec, env: Env) -> ModuleStatistics:
    """Statistics of one module; spectra from the factors, the kurtosis from whole rows."""
    if not spec.is_matrix:
        values = load_vector(spec, env) * spec.scaling
        norm = float(torch.linalg.vector_norm(values))
        return ModuleStatistics(norm, norm, float(norm > 0), 0.0, _kurtosis([values]), len(values))
    pairs = scaled_pairs(spec, env)
    sigma = torch.stack([product_spectrum(*p) for p in pairs]).square().sum(0).sqrt()
    total = float(sigma.square().sum())
    rows = [_some_rows(p, len(pairs)) for p in pairs]
    share = sigma.square() / total if total else sigma
    p = share[share > 0]
    spread = float(-(p * p.log()).sum()) / math.log(len(sigma)) if len(sigma) > 1 else 0.0
    return ModuleStatistics(
        norm=math.sqrt(total),
        sigma_1=float(sigma.max()),
        concentration=float(share.max()),
        entropy=max(0.0, spread),
        kurtosis=_kurtosis(rows),
        sampled=sum(r.numel() for r in rows),
    )


def _some_rows(pair: tuple[torch.Tensor, torch.Tensor], matrices: int) -> torch.Tensor:
    """Whole rows of ΔW, spread evenly; all of them in a small matrix."""
    lora_B, lora_A = pair
    rows = lora_B.shape[0]
    count = min(rows, max(1, SAMPLE_ELEMENTS // matrices // lora_A.shape[1]))
    return lora_B[torch.arange(count) * rows // count] @ lora_A


def _kurtosis(parts: Sequence[torch.Tensor]) -> float:
    values = torch.cat([p.flatten() for p in parts])
    centred = values - values.mean()
    square = float(centred.square().mean())
    if square == 0:
        return math.nan
    return float((centred / math.sqrt(square)).pow(4).mean())


# ------------------------------------------------------------------------------- intruders


_COPIES = 6  # float64 matrices of a weight's size that looking for intruders takes at most


class IntruderResult(Frozen):
    """Intruders of one matrix, and the change without part of them if that was asked for.

    Attributes:
        cosine: per leading direction.
        index: which are intruders.
        pair: (lora_B, lora_A) of rank r with scaling 1, float64.
        square: ‖ΔW'‖² of the weakened change.
        moved_square: ‖ΔW' − ΔW‖².
        error_square: ‖truncated − ΔW'‖².
    """

    cosine: tuple[float, ...]
    index: tuple[int, ...]
    pair: tuple[torch.Tensor, torch.Tensor] | None = None
    square: float = 0.0
    moved_square: float = 0.0
    error_square: float = 0.0


def look_for_intruders(place: Place, env: Env, weaken: float | None = None) -> IntruderResult:
    """Intruders of one delta in its place in the base.

    Args:
        place: the delta on a weight, or on what the adapter replaces that with.
        env: for loading, and the device to compute on where the weight fits there.
        weaken: λ; None = only look.
    """
    weight, part = load_region(place, env), place.part
    delta = load_delta(part, env.load, coefficient=part.spec.scaling, dtype=torch.float64)
    weight = weight.to(_place_for(weight, env.device)).double()
    if isinstance(delta, LowRank):
        change = delta.left.to(weight) @ delta.right.to(weight)
    else:
        change = delta.dense().to(weight)
    found = find_intruders(weight, change).cpu()
    result = IntruderResult(tuple(found.cosine.tolist()), found.index)
    if weaken is None:
        return result
    assert isinstance(delta, LowRank)  # who asks for more than a look has seen to that
    return _weaken(result, delta, found, weaken, part)


def _place_for(weight: torch.Tensor, device: torch.device) -> torch.device:
    """The device, or the CPU for a weight that would fill more than half of it."""
    if device.type == "cuda":
        need = _COPIES * 8 * weight.numel()
        if 2 * need > torch.cuda.get_device_properties(device).total_memory:
            return torch.device("cpu")
    return device


def _weaken(
    result: IntruderResult, delta: LowRank, found: Intruders, factor: float, part: DeltaPart
) -> IntruderResult:
    rank = delta.left.shape[1]
    left, right = weakened(delta.left, delta.right, found, factor)
    new_left, new_right = split_factors(*product_svd(left, right), rank)
    lost = product_norm(*concat_factors([(new_left, new_right, 1.0), (left, right, -1.0)]))
    index = list(found.index)
    moved = float((found.S[index] * (factor - 1)).square().sum())
    pair = (new_right.T, new_left.T) if part.transposed else (new_left, new_right)
    return replace(
        result, pair=pair, square=product_norm(left, right) ** 2, moved_square=moved,
        error_square=lost**2,
    )  # fmt: skip


def repack(spec: DeltaSpec, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> DeltaSpec:
    """Factors with scaling 1 in the spec's stored form: √|scaling| is taken from both sides.

    Fewer directions than the rank are filled up with zeros.
    """
    root = math.sqrt(abs(spec.scaling))
    sign = 1.0 if spec.scaling > 0 else -1.0
    made = []
    for lora_B, lora_A in pairs:
        more = spec.product_rank - lora_A.shape[0]
        pad = torch.nn.functional.pad
        made.append((pad(lora_B * (sign / root), (0, more)), pad(lora_A / root, (0, 0, 0, more))))
    return pack_pairs(spec, made, left_of(spec).dtype)
