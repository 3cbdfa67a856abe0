"""One module of several adapters made into one pair of factors, by any method but a plain sum."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from loratool.adapter import DeltaSpec, Replacement
from loratool.delta.forms import factors_of, with_factors, with_values
from loratool.delta.lowrank import Pair
from loratool.dtypes import widest
from loratool.engine import grid
from loratool.engine.factors import (
    load_pairs,
    load_vector,
    make_data,
    overflows,
    pack_pairs,
    padded,
    round_once,
)
from loratool.engine.kernel import Env
from loratool.engine.summing import SummedModule, sum_factors
from loratool.frozen import Frozen, replace
from loratool.linalg import core, fit
from loratool.linalg.concat import difference_square, product_norm
from loratool.linalg.dense import DenseCombiner, combine_rows, combine_whole
from loratool.linalg.norms import sum_of_squares
from loratool.linalg.product import product_svd, split_factors
from loratool.methods import Method
from loratool.plan import DeltaPart
from loratool.plugins import function_of


class Recipe(Frozen):
    """How modules are combined.

    Attributes:
        method: row of the registry.
        params: all of its parameters.
        rank: asked for, None = the method's own.
    """

    method: Method
    params: Mapping[str, Any]
    rank: int | None = None


def random_keys(params: Mapping[str, Any], name: str, terms: Sequence[DeltaPart]) -> list[int]:
    """A 64-bit key per adapter: from the seed, the module and the adapter's position."""
    seed = params.get("seed", 0)
    texts = [f"{seed} {term.adapter} {name}" for term in terms]
    digests = [hashlib.sha256(text.encode()).digest()[:8] for text in texts]
    return [int.from_bytes(d, "little", signed=True) for d in digests]


def combine_factors(
    like: DeltaSpec,
    terms: Sequence[DeltaPart],
    env: Env,
    how: Recipe,
    *,
    gain: float,
    rank: int,
    alpha: int | None,
    dtype: str,
) -> SummedModule:
    """New factors of one module.

    Args:
        like: name, layout and packing of the result.
        terms: with the weights of the adapters.
        env: for loading.
        how: method, parameters.
        gain: what the reader multiplies the scaling by.
        rank: of the result; where a matrix has fewer, zeros fill up.
        alpha: for plain sums, as `sum_factors` takes it.
        dtype: storage type.
    """
    if how.method.space == "cat":
        if how.method.gives_weights:
            terms = _reweighed(terms, env, how.method)
        return sum_factors(
            like, terms, env, gain=gain, alpha=alpha, rank=how.rank and rank, dtype=dtype
        )
    keys = random_keys(how.params, like.name, terms)
    if how.method.space == "factor":
        apart = _combine_apart(like, terms, env, how, keys, gain)
        matrices = [(pair,) for pair in load_pairs(apart, env)]
    else:
        matrices = list(zip(*(load_pairs(term.spec, env) for term in terms), strict=True))
    made: list[Pair] = []
    square = error = 0.0
    for number in range(len(matrices)):
        found, whole, tail = _combine(matrices.pop(0), terms, how, keys, rank, number)
        lora_B, lora_A = (padded(found[0], rank, 1) / gain, padded(found[1], rank, 0))
        del found
        square += whole
        error += tail
        rounded = round_once(lora_B, dtype).double(), round_once(lora_A, dtype).double()
        error += gain**2 * difference_square(rounded, (lora_B, lora_A))
        del rounded
        made.append((lora_B, lora_A))
    spec = pack_pairs(like, made, dtype, rank=rank, alpha=float(rank), scaling=gain)
    return SummedModule(spec, square, error, any(overflows(t, dtype) for p in made for t in p))


def combine_vectors(
    like: DeltaSpec,
    terms: Sequence[DeltaPart],
    env: Env,
    how: Recipe,
    *,
    scaling: float,
    alpha: float | None,
    dtype: str,
) -> SummedModule:
    """A bias delta: element-wise methods as on matrices, everything else adds up."""
    values = torch.stack([load_vector(t.spec, env) * t.spec.scaling for t in terms])
    weights = [t.weight for t in terms]
    if how.method.space == "dense":
        keys = random_keys(how.params, like.name, terms)
        total = combine_whole(values[:, None], how.method, how.params, weights, keys)[0]
    else:
        if how.method.gives_weights and not how.method.is_between:
            columns = [(value[:, None], value.new_ones(1, 1)) for value in values]
            weights = function_of(how.method.function)(columns, weights)
        total = torch.einsum("tn,t->n", values, torch.tensor(weights, dtype=values.dtype))
    error = float((round_once(total / scaling, dtype).double() * scaling - total).norm())
    data = make_data(f"{like.name} delta", total / scaling, dtype)
    spec = with_values(like, data, alpha=alpha, scaling=scaling)
    return SummedModule(
        spec, float(total.square().sum()), error**2, overflows(total / scaling, dtype)
    )


def mix_replacements(found: Sequence[tuple[Replacement, float]], env: Env) -> Replacement:
    """Σ weight·tensor of tensors that take the same place, weights adding up to 1."""
    first = found[0][0]
    total = sum(env.load(one.source).double() * weight for one, weight in found)
    assert isinstance(total, torch.Tensor)
    dtype = widest([one.source.dtype for one, _ in found])
    return replace(first, source=make_data(first.name, total, dtype))


def _combine(
    pairs: Sequence[Pair],
    terms: Sequence[DeltaPart],
    how: Recipe,
    keys: Sequence[int],
    rank: int,
    number: int,
) -> tuple[Pair, float, float]:
    """Factors of at most ``rank``, ‖Δ‖² of the exact result, and what the cut left out."""
    weights = [t.weight for t in terms]
    if how.method.space == "factor":  # combined already, and scaled
        scaled = list(pairs)
    else:
        scaled = [(B * t.spec.scaling, A) for (B, A), t in zip(pairs, terms, strict=True)]
    if how.method.space == "dense":
        return _combine_dense(scaled, weights, how, keys, rank, number)
    if how.method.space == "factor":
        (found,) = scaled
        if how.rank is None:
            return found, product_norm(*found) ** 2, 0.0
        U, S, Vh = product_svd(*found)
    elif how.method.space == "joint":
        joint = function_of(how.method.function)(scaled, weights, keys=keys, **how.params)
        del scaled, pairs
        U, S, Vh = product_svd(*joint)
        del joint
    else:
        left, right, cores = core.core_space(scaled)
        del scaled, pairs
        merged = function_of(how.method.function)(
            cores, weights, keys=keys, rank=rank, **how.params
        )
        u, S, vh = torch.linalg.svd(merged, full_matrices=False)
        U, Vh = left @ u, vh @ right.T
        del left, right
    return (
        split_factors(U, S, Vh, rank), float(S.square().sum()), float(S[rank:].square().sum())
    )  # fmt: skip


def _combine_dense(
    scaled: Sequence[Pair],
    weights: Sequence[float],
    how: Recipe,
    keys: Sequence[int],
    rank: int,
    number: int,
) -> tuple[Pair, float, float]:
    """ΔW in float32, block of rows by block of rows; the result is the one whole matrix."""
    rows, cols = scaled[0][0].shape[0], scaled[0][1].shape[1]
    factors = [(B.float(), A.float()) for B, A in scaled]
    combiner = DenseCombiner(how.method, how.params, weights, rows * cols, keys)
    height = max(1, grid.CPU_ELEMENTS // cols)
    room = torch.empty(len(factors), min(height, rows), cols)  # one block at a time

    def block(r0: int, r1: int) -> torch.Tensor:
        values = room[:, : r1 - r0]
        for out, (B, A) in zip(values, factors, strict=True):
            torch.mm(B[r0:r1], A, out=out)
        return values

    whole = combine_rows(combiner, (rows, cols), block, height=height, offset=number * rows * cols)
    square = sum_of_squares(whole)
    if square == 0:
        zero = torch.zeros(rows, rank, dtype=torch.float64), torch.zeros(rank, cols).double()
        return zero, 0.0, 0.0
    seed = keys[0] & 0x7FFFFFFF
    found = fit.truncate(whole[None], rank, seeds=[seed], squares=[square])
    kept = float(found.singular_values.square().sum())
    pair = found.lora_B[0].double(), found.lora_A[0].double()
    return pair, square, max(0.0, square - kept)


def _combine_apart(
    like: DeltaSpec,
    terms: Sequence[DeltaPart],
    env: Env,
    how: Recipe,
    keys: Sequence[int],
    gain: float,
) -> DeltaSpec:
    """PEFT's way: √|weight · α/r| on both factors as they are stored, the sign on lora_A.

    Where the method takes whole weights: |weight| · √|α/r|.  What is chosen among elements is
    chosen among all of a tensor: of all experts, and without the zeros around blocks.
    """
    specs = [t.spec for t in terms]
    if len({s.blocks for s in specs}) > 1 or not all(s.is_pair for s in specs):
        specs = [_laid_out(s, env) for s in specs]
        like = _laid_out(like, env)
    coefficients = [t.weight * t.spec.scaling / gain for t in terms]
    if how.method.is_whole:
        coefficients = [c * abs(t.weight) for c, t in zip(coefficients, terms, strict=True)]
    roots = [abs(c) ** 0.5 for c in coefficients]
    signed = [r if c >= 0 else -r for r, c in zip(roots, coefficients, strict=True)]
    stored = []
    for side, weights in enumerate((roots, signed)):
        sheets = [_one_below_another(s, side, env) for s in specs]
        stream = [key + side for key in keys]
        made = combine_whole(torch.stack(sheets), how.method, how.params, weights, stream)
        if side == 0:
            made *= gain
            if like.experts:  # PEFT's order of columns
                made = made.view(like.experts, -1, like.rank).permute(1, 2, 0)
        shape = factors_of(like)[side].shape
        stored.append(make_data(f"{like.name} factor", made.reshape(shape), "F64"))
    return with_factors(like, *stored, blocks=like.blocks)


def _laid_out(spec: DeltaSpec, env: Env) -> DeltaSpec:
    """With the zeros around blocks."""
    return pack_pairs(spec, load_pairs(spec, env), "F64")


def _one_below_another(spec: DeltaSpec, side: int, env: Env) -> torch.Tensor:
    """A factor as it is stored; the left one (side 0) of experts one expert after the other."""
    tensor = env.load(factors_of(spec)[side]).double().flatten(1)
    if side or not spec.experts:
        return tensor
    if spec.b_order == "expert-major":
        return tensor.view(len(tensor), spec.experts, -1).transpose(0, 1).flatten(0, 1)
    return tensor.view(len(tensor), -1, spec.experts).permute(2, 0, 1).flatten(0, 1)


def _reweighed(terms: Sequence[DeltaPart], env: Env, method: Method) -> list[DeltaPart]:
    """The terms with the weights that follow from their sizes and angles."""
    if len(terms) < 2:
        return list(terms)
    sides = []
    for term in terms:
        pairs = load_pairs(term.spec, env)
        sides.append(_block_pair([(B * term.spec.scaling, A) for B, A in pairs]))
    found = function_of(method.function)(sides, [t.weight for t in terms])
    return [replace(t, weight=w) for t, w in zip(terms, found, strict=True)]


def _block_pair(pairs: Sequence[Pair]) -> Pair:
    """Experts as one block-diagonal product."""
    if len(pairs) == 1:
        return pairs[0]
    left = torch.block_diag(*(B for B, _ in pairs))  # type: ignore[no-untyped-call]
    return left, torch.block_diag(*(A for _, A in pairs))  # type: ignore[no-untyped-call]
