"""Changes that depend on the base, taken apart with the base at hand.

Each of them is W' - W = (diag(c) - 1) W + B A: a LoRA has c = 1; DoRA has c = m/‖V‖ with
V = W + s·lora_B·lora_A; and what PiSSA and its kin take away from the base is itself a product of
two thin matrices.  Such changes add up, and a sum with any c is a DoRA again: the rows of
W + diag(1/c) B A, of the lengths that c gives them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from loratool.adapter import DeltaSpec, Replacement, TensorData, TensorRef
from loratool.delta.forms import (
    kernel_of,
    lengths_of,
    new_difference,
    with_kernel,
    with_lengths,
    without_lengths,
)
from loratool.delta.load import load_delta
from loratool.delta.lowrank import Pair
from loratool.delta.mutation import from_whole_base, removed_part
from loratool.dtypes import widest
from loratool.engine.converting import Paired
from loratool.engine.factors import load_pairs, make_data, overflows, pack_pairs, round_once
from loratool.engine.kernel import Env
from loratool.errors import NumericError
from loratool.frozen import replace
from loratool.linalg.concat import concat_factors, difference_square
from loratool.linalg.product import product_svd, split_factors
from loratool.plan import DeltaPart, Place, Span

_ELEMENTS = 1 << 20  # of W in float64 at a time
_NOISE = 2.0**-44  # of the largest singular value: what is less is the decomposition's own rounding


def stored_weight(places: Sequence[Place], env: Env) -> torch.Tensor:
    """The weight under a delta, put together from its places, as the base stores it."""
    cuts = [load_region(place, env) for place in places]
    if len(cuts) == 1 and not places[0].is_cut:
        return cuts[0]
    spans = [(place.part.region.source_rows, place.part.region.source_cols) for place in places]
    rows, cols = (
        max(span[axis][1] if span[axis] else cut.shape[axis]  # type: ignore[index]
            for span, cut in zip(spans, cuts, strict=True))
        for axis in (0, 1)
    )  # fmt: skip
    out = torch.zeros(rows, cols, dtype=cuts[0].dtype)
    for (row, col), cut in zip(spans, cuts, strict=True):
        out[slice(*row) if row else slice(None), slice(*col) if col else slice(None)] = cut
    return out


def load_region(place: Place, env: Env) -> torch.Tensor:
    """The part of a tensor that a delta covers, (rows, cols) in its stored type."""
    weight, region = env.load(place.source).view(place.view), place.part.region
    return _cut(_cut(weight, region.rows, 0), region.cols, 1)


def _cut(weight: torch.Tensor, spans: Sequence[Span], axis: int) -> torch.Tensor:
    if not spans:
        return weight
    index = torch.cat([torch.arange(s.start, s.stop, s.step) for s in spans])
    return weight.index_select(axis, index)


def with_start(spec: DeltaSpec, places: Sequence[Place], env: Env) -> DeltaSpec:
    """The product s·lora_B·lora_A less what loading takes from the base: rank 2 r at most.

    The two products nearly cancel: decomposed, so that rounding is relative to what is left.
    """
    weight = stored_weight(places, env)
    left, right = removed_part(spec, weight)
    if places[0].part.transposed:
        left, right = right.T, left.T
    (pair,) = load_pairs(spec, env)
    joint = concat_factors([(*pair, spec.scaling), (left, right, -1.0)])
    U, S, Vh = product_svd(*joint)
    made = split_factors(U, S, Vh, len(S))
    return _with_pairs(from_whole_base(spec), [made], scaling=1.0)


def with_change(spec: DeltaSpec, places: Sequence[Place], env: Env) -> DeltaSpec:
    """W' - W of a change that depends on W in another way, decomposed: of the rank that it has."""
    U, S, Vh = _change(spec, places, env)
    made = _with_pairs(spec, [split_factors(U, S, Vh, len(S))], scaling=1.0)
    return with_kernel(made, places[0].source.shape)


def as_lora(
    spec: DeltaSpec, places: Sequence[Place], env: Env, *, rank: int | None, dtype: str
) -> Paired:
    """W' - W of a change that depends on W, as the best two factors of a rank.

    Args:
        spec: the change.
        places: where it lies in the base.
        env: for loading.
        rank: at most; None = that which the change has.
        dtype: of the factors; float32 where float16 overflows.
    """
    if spec.reach == "all" and not spec.scales_rows:
        (pair,) = load_pairs(with_start(spec, places, env), env)
        U, S, Vh = product_svd(*pair)
    else:
        U, S, Vh = _change(spec, places, env)
    kept = max(1, min(rank or len(S), int((S[:1] * _NOISE < S).sum())))
    exact = split_factors(U, S, Vh, kept)
    dtype = "F32" if any(overflows(one, dtype) for one in exact) else dtype
    stored = [round_once(one, dtype).double() for one in exact]
    made = pack_pairs(
        without_lengths(spec), [exact], dtype, rank=kept, alpha=float(kept), scaling=1.0,
        base_change="", settings={},
    )  # fmt: skip
    made = with_kernel(made, places[0].source.shape)
    lost = float(S[kept:].square().sum()) + difference_square((stored[0], stored[1]), exact)
    return Paired(made, float(S.square().sum()), lost)


def as_difference(spec: DeltaSpec, places: Sequence[Place], env: Env) -> DeltaSpec:
    """W' - W as it is, (out, in) or (n,) in float64; of PiSSA and its kin thin factors of it."""
    if spec.reach == "all" and not spec.scales_rows:
        return with_start(spec, places, env)
    change = _difference(spec, places, env)
    made = new_difference(spec.name, make_data(spec.name, change, "F64"))
    return replace(made, module=spec.module, parameter=spec.parameter)


def changed_vector(places: Sequence[Place], env: Env) -> TensorData:
    """W' of a vector that changes as the base's numbers do, in the base's type."""
    part, source = places[0].part, places[0].source
    weight = stored_weight(places, env).double()
    delta = load_delta(part, env.load, coefficient=part.spec.scaling, dtype=torch.float64)
    return make_data(part.spec.name, delta.apply_to(weight).view(source.shape), source.dtype)


def _change(
    spec: DeltaSpec, places: Sequence[Place], env: Env
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """W' - W, decomposed, without what is the decomposition's own rounding."""
    change = _difference(spec, places, env)
    if not bool(change.isfinite().all()):
        raise NumericError(
            "LT-801", "a value is NaN or infinite", key=spec.name, got="in the change of the base"
        )
    U, S, Vh = torch.linalg.svd(change, full_matrices=False)
    rank = max(1, int((S[:1] * _NOISE < S).sum()))
    return U[:, :rank], S[:rank], Vh[:rank]


def _difference(spec: DeltaSpec, places: Sequence[Place], env: Env) -> torch.Tensor:
    """W' - W (out, in), or (n,) of a vector, in float64."""
    weight = stored_weight(places, env).double()
    part = DeltaPart(spec, 1.0, transposed=places[0].part.transposed)
    delta = load_delta(part, env.load, coefficient=spec.scaling, dtype=torch.float64)
    change = delta.apply_to(weight) - weight
    if not spec.is_matrix:
        return change.flatten()
    return change.T if part.transposed else change


def _with_pairs(spec: DeltaSpec, pairs: Sequence[Pair], scaling: float) -> DeltaSpec:
    rank = pairs[0][1].shape[0]
    return pack_pairs(
        without_lengths(spec), pairs, "F64", rank=rank, alpha=rank * scaling, scaling=scaling
    )


def row_gains(spec: DeltaSpec, places: Sequence[Place], env: Env) -> torch.Tensor:
    """The gain c = m/‖W + s·lora_B·lora_A‖ of every output feature, (out,) float64.

    Raises:
        NumericError: LT-806, a row of nothing but zeros has no direction.
    """
    lengths = row_lengths(spec, places, env)
    zero = (lengths == 0).nonzero().flatten()
    if len(zero):
        raise NumericError(
            "LT-806", "a row of W + ΔW is zero, and DoRA divides by its length", key=spec.name,
            got=f"row {int(zero[0])}",
        )  # fmt: skip
    magnitude = lengths_of(spec)
    assert magnitude is not None
    return env.load(magnitude).double().flatten() / lengths


def row_lengths(spec: DeltaSpec, places: Sequence[Place], env: Env) -> torch.Tensor:
    """‖W + s·lora_B·lora_A‖ of every output feature, (out,) float64; W as training had it."""
    if spec.base_change:
        spec = with_start(spec, places, env)
    weight = stored_weight(places, env)
    if places[0].part.transposed:
        weight = weight.T
    ((lora_B, lora_A),) = load_pairs(spec, env)
    return torch.cat([
        torch.addmm(weight[rows].double(), lora_B[rows], lora_A, alpha=spec.scaling).norm(dim=1)
        for rows in _row_blocks(*weight.shape)
    ])  # fmt: skip


def _row_blocks(rows: int, cols: int) -> Iterator[slice]:
    height = max(1, _ELEMENTS // cols)
    return (slice(r, min(r + height, rows)) for r in range(0, rows, height))


def with_rows_scaled(spec: DeltaSpec, factors: torch.Tensor, env: Env) -> DeltaSpec:
    """The low-rank part alone, row i of lora_B times ``factors[i]``; as stored where all are 1."""
    if bool((factors == 1).all()):
        return without_lengths(spec)
    pairs = [(lora_B * factors[:, None], lora_A) for lora_B, lora_A in load_pairs(spec, env)]
    return _with_pairs(spec, pairs, spec.scaling)


def with_magnitude(
    spec: DeltaSpec, gains: torch.Tensor | None, places: Sequence[Place], env: Env
) -> DeltaSpec:
    """The DoRA whose rows are those of W + ΔW times ``gains`` (None: as they are).

    Magnitudes are float32 whatever the factors are: rounding them would move W itself.
    """
    spec = with_kernel(spec, places[0].source.shape)
    lengths = row_lengths(spec, places, env)
    if gains is not None:
        lengths *= gains
    kernel = kernel_of(spec)
    shape = (1, -1, *(1 for _ in kernel)) if spec.layout == "conv" else (-1,)
    data = make_data(f"{spec.name} magnitude", lengths.view(shape), "F32")
    return with_lengths(spec, data)


def blend(found: Sequence[tuple[Replacement, float]], base: TensorRef, env: Env) -> Replacement:
    """W + Σ weight·(new - W) of tensors, or of rows, that take the same place.

    Args:
        found: with their weights; all of them whole, or all of them rows.
        base: what they replace.
        env: for loading.
    """
    first = found[0][0]
    rows = sorted({row for one, _ in found for row in one.rows or ()})
    weight = (_rows_of(base, rows, env) if first.rows is not None else env.load(base)).double()
    total = weight.clone()
    for one, factor in found:
        new = env.load(one.source).double()
        if one.rows is None:
            total.add_(new.sub_(weight), alpha=factor)
        else:
            at = torch.tensor([rows.index(row) for row in one.rows])
            total.index_add_(0, at, new.sub_(weight[at]), alpha=factor)
    source = make_data(first.name, total, widest([one.source.dtype for one, _ in found]))
    return replace(first, source=source, rows=None if first.rows is None else tuple(rows))


def _rows_of(base: TensorRef, rows: Sequence[int], env: Env) -> torch.Tensor:
    """Single rows of a large table."""
    nbytes, shape = base.nbytes // base.shape[0], (1, *base.shape[1:])
    return torch.cat([
        env.load(replace(base, shape=shape, start=base.start + row * nbytes, nbytes=nbytes))
        for row in rows
    ])  # fmt: skip
