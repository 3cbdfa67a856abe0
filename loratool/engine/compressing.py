"""Singular values of a delta, and its truncated factors as they will be stored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from loratool.adapter import DeltaSpec, TensorData
from loratool.delta.forms import kernel_of, values_of
from loratool.delta.lowrank import packed
from loratool.engine.buffers import SAFETENSORS_NAMES, TORCH_DTYPES, to_bytes
from loratool.engine.factors import FP16_ROUNDED, load_pairs, padded, round_once
from loratool.engine.kernel import Env, ModuleKernel
from loratool.engine.step_args import FactorArgs, SpectrumArgs
from loratool.errors import NumericError
from loratool.frozen import Frozen, replace
from loratool.linalg.product import ProductSVD, factor_product, product_spectrum, split_factors
from loratool.linalg.rank import RankRule, choose_rank
from loratool.linalg.shares import allocate_with_shares
from loratool.plan import DeltaPart, Step
from loratool.report.spectrum import MOST_SIGMA

_LARGEST_FP16 = 65504.0


class Spectrum(Frozen):
    """Singular values of one delta, scaling included.

    Attributes:
        name: parameter.
        sigma: one descending row per expert, one row for anything else.
    """

    name: str
    sigma: torch.Tensor

    @property
    def joint(self) -> torch.Tensor:
        """√Σ_experts σᵢ²: what rank i of the whole parameter is worth."""
        return self.sigma.square().sum(0).sqrt()


class Factored(Frozen):
    """A delta at its new rank.

    Attributes:
        name: parameter.
        rank: kept.
        square: ‖ΔW‖_F².
        kept_square: Σσ² kept, before rounding.
        residual_square: ‖ΔW − lora_B lora_A‖_F² of what is stored.
        factors: (lora_A, lora_B) in PEFT's shapes; None at rank 0, or where the old ones stay.
        is_widened: stored in float32 since float16 could not hold the values.
        bias: the module's bias delta with the old scaling folded in.
        sigma: singular values before, descending, experts joined; `MOST_SIGMA` of them at most.
    """

    name: str
    rank: int
    square: float
    kept_square: float
    residual_square: float
    factors: tuple[TensorData, TensorData] | None = None
    is_widened: bool = False
    bias: TensorData | None = None
    sigma: tuple[float, ...] = ()


class MeasureSpectrum(ModuleKernel):
    """Singular values by QR of both factors."""

    args: SpectrumArgs

    def finish(self) -> Spectrum:
        """One row per expert; NaN for factors that are not finite if ``keep_going``."""
        try:
            return self._measure()
        except NumericError:
            if not self.args.keep_going:
                raise
            return Spectrum(self.step.output.name, torch.full((1, 1), torch.nan))

    def _measure(self) -> Spectrum:
        rows = [product_spectrum(B, A) for B, A in scaled_factors(_spec(self.step), self.env)]
        return Spectrum(self.step.output.name, torch.stack(rows))


class Factor(ModuleKernel):
    """The truncated SVD of a delta, split into balanced factors of its storage type.

    The old factors stay where the new ones would not be smaller.
    """

    args: FactorArgs

    def finish(self) -> Factored:
        """Choose the rank if it is not given, truncate, round, measure what is stored."""
        pairs = list(scaled_factors(_spec(self.step), self.env))
        found = [factor_product(B, A) for B, A in pairs]
        squares = torch.stack([f.S for f in found]).square().sum(0)
        sigma = tuple(squares[:MOST_SIGMA].sqrt().tolist())
        return replace(self._cut(pairs, found, squares), sigma=sigma)

    def _cut(
        self,
        pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
        found: Sequence[ProductSVD],
        squares: torch.Tensor,
    ) -> Factored:
        spec, args = _spec(self.step), self.args
        rank = args.rank
        if rank is None:
            rank = _capped(squares.sqrt(), RankRule(**(args.rule or {})), args.cap)
        name, square = self.step.output.name, float(squares.sum())
        kept = float(squares[:rank].sum())
        if rank == 0:
            return Factored(name, 0, square, 0.0, square)
        may_stay = not args.must_rewrite
        if rank >= spec.product_rank and may_stay:
            return Factored(name, spec.product_rank, square, square, 0.0)
        stored, residual = _store(found, pairs, rank, args.dtype, args.gain)
        wide = False
        if stored is None:
            stored, residual = _store(found, pairs, rank, "F32", args.gain)
            wide = True
        assert stored is not None
        factors = _packed(stored, spec, name)
        before = sum(source.nbytes for source in spec.fields.values())
        if sum(f.nbytes for f in factors) >= before and args.is_free and may_stay:
            return Factored(name, spec.product_rank, square, square, 0.0)
        bias = _scaled_bias(args.bias, self.env)
        return Factored(name, rank, square, kept, residual, factors, wide, bias)


def scaled_factors(spec: DeltaSpec, env: Env) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(scaling · lora_B (out, r), lora_A (r, in)) in float64, one pair per expert."""
    return ((lora_B * spec.scaling, lora_A) for lora_B, lora_A in load_pairs(spec, env))


def _store(
    found: Sequence[ProductSVD],
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
    rank: int,
    dtype: str,
    gain: float,
) -> tuple[list[tuple[torch.Tensor, torch.Tensor]] | None, float]:
    """Rounded (lora_B, lora_A) of every expert and the squared error of all.

    None where float16 cannot hold them: values past its range, or so small that it loses digits.
    """
    target = TORCH_DTYPES[dtype]
    out, residual, moved, kept = [], 0.0, 0.0, 0.0
    for svd, (B, A) in zip(found, pairs, strict=True):
        U, Vh = svd.vectors(rank)
        left, right = split_factors(U, svd.S / gain, Vh, rank)  # (out, k), (k, in)
        left, right = padded(left, rank, 1), padded(right, rank, 0)
        rounded = round_once(left, dtype), round_once(right, dtype)
        if target == torch.float16 and max(float(f.abs().max()) for f in (left, right)) >= (
            _LARGEST_FP16
        ):
            return None, 0.0
        step = _stored_error(left, right, rounded, B / gain, A)
        tail = float(svd.S[rank:].square().sum())
        residual += tail + gain**2 * (step[0] + step[1])
        moved += gain**2 * step[0]
        kept += float(svd.S[:rank].square().sum())
        out.append(rounded)
    if target == torch.float16 and moved > FP16_ROUNDED**2 * kept:
        return None, 0.0
    return out, max(0.0, residual)


def _stored_error(
    left: torch.Tensor,
    right: torch.Tensor,
    rounded: tuple[torch.Tensor, torch.Tensor],
    B: torch.Tensor,
    A: torch.Tensor,
) -> tuple[float, float]:
    """What rounding the factors adds to the squared error, from k×k products.

    With δB, δA the roundings, R = B' A' - left right = δB A' + left δA, and the tail
    T = B A - left right is orthogonal to all of R but δB δA.

    Returns:
        ‖R‖_F² and -2⟨T, R⟩.
    """
    new_B, new_A = rounded[0].double(), rounded[1].double()
    dB, dA = new_B - left, new_A - right
    square = ((dB.T @ dB) * (new_A @ new_A.T)).sum()
    square += ((left.T @ left) * (dA @ dA.T)).sum()
    square += 2 * ((dB.T @ left) * (new_A @ dA.T)).sum()
    cross = ((B.T @ dB) * (A @ dA.T)).sum() - ((left.T @ dB) * (right @ dA.T)).sum()
    return max(0.0, float(square)), -2 * float(cross)


def _packed(
    stored: Sequence[tuple[torch.Tensor, torch.Tensor]], spec: DeltaSpec, name: str
) -> tuple[TensorData, TensorData]:
    """Factors of all experts in the shapes and packing that PEFT stores."""
    lora_B, lora_A = (torch.stack([pair[side] for pair in stored]) for side in (0, 1))
    kernel = kernel_of(spec) if spec.layout == "conv" else ()
    left, right = packed(lora_B, lora_A, experts=spec.experts, kernel=kernel)
    return _data(right, f"{name} lora_A"), _data(left, f"{name} lora_B")


def _scaled_bias(bias: DeltaSpec | None, env: Env) -> TensorData | None:
    if bias is None:
        return None
    delta = env.load(values_of(bias))
    scaled = round_once(delta.double() * bias.scaling, SAFETENSORS_NAMES[delta.dtype])
    if not torch.isfinite(scaled).all():
        scaled = (delta.double() * bias.scaling).float()
    return _data(scaled, f"{bias.name} delta")


def _data(tensor: torch.Tensor, name: str) -> TensorData:
    dtype = SAFETENSORS_NAMES[tensor.dtype]
    return TensorData(name, dtype, tuple(tensor.shape), bytes(to_bytes(tensor)))


def _spec(step: Step) -> DeltaSpec:
    part: Any = step.parts[0]
    assert isinstance(part, DeltaPart)
    return part.spec


def choose_group_ranks(
    groups: Sequence[Sequence[Spectrum]],
    rules: Sequence[Sequence[Mapping[str, Any]]],
    floors: Sequence[int],
    caps: Sequence[Sequence[int | None]] | None = None,
) -> list[int]:
    """One rank per group: the largest that the rules ask for any of its members.

    Args:
        groups: spectra of deltas that must have one rank.
        rules: of each member, fields of a `RankRule`.
        floors: smallest rank of each group.
        caps: largest rank of each member besides its rule; None = no limit.
    """
    limits = caps or [[None] * len(group) for group in groups]
    return [
        max(floor, *(_capped(m.joint, RankRule(**r), c)
                     for m, r, c in zip(group, rule, cap, strict=True)))
        for group, rule, floor, cap in zip(groups, rules, floors, limits, strict=True)
    ]  # fmt: skip


def _capped(sigma: torch.Tensor, rule: RankRule, cap: int | None) -> int:
    rank = choose_rank(sigma, rule)
    return rank if cap is None else min(rank, cap)


def spend(
    groups: Sequence[Sequence[Spectrum]],
    costs: Sequence[int],
    shares: Sequence[int],
    budget: int,
    caps: Sequence[int],
    floors: Sequence[int],
) -> list[int]:
    """The ranks between floors and caps that keep the most energy within a budget of bytes.

    Args:
        groups: spectra of those that have one rank.
        costs: bytes of one rank of each group.
        shares: bytes of each group's part of the header.
        budget: bytes for all of these.
        caps: largest rank of each group.
        floors: smallest rank of each group.
    """
    squares = []
    for group, cap, floor in zip(groups, caps, floors, strict=True):
        joint = torch.zeros(max(cap, *(one.sigma.shape[1] for one in group)), dtype=torch.float64)
        for one in group:
            joint[: one.sigma.shape[1]] += one.joint.square()
        squares.append(joint[floor:cap])
    there = [c * f + h * (f > 0) for c, f, h in zip(costs, floors, shares, strict=True)]
    free = [0 if f else h for f, h in zip(floors, shares, strict=True)]
    more = allocate_with_shares(squares, costs, free, budget - sum(there))
    return [f + k for f, k in zip(floors, more, strict=True)]


def kept_energy(groups: Sequence[Sequence[Spectrum]], ranks: Sequence[int]) -> float:
    """Σσ² that ranks keep, over all members of all groups."""
    return sum(
        float(one.sigma[:, :rank].square().sum())
        for group, rank in zip(groups, ranks, strict=True)
        for one in group
    )
