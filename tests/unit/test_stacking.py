"""Cutting changes into rows and putting them below each other: the same numbers, in every kind."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratool.adapter import DeltaSpec, Source, TensorData
from loratool.delta.stacking import cut, join, swap_halves
from loratool.frozen import replace
from loratool.store.reader import read_bytes

SIZES = {"F16": np.float16, "F32": np.float32, "F64": np.float64}


def held(array: np.ndarray) -> TensorData:
    dtype = next(name for name, kind in SIZES.items() if array.dtype == kind)
    return TensorData("x", dtype, array.shape, array.tobytes())


def array(source: Source) -> np.ndarray:
    flat = np.frombuffer(bytes(read_bytes(source)), SIZES[source.dtype])
    return flat.reshape(source.shape).astype(np.float64)


def remake(source: Source, factor: float, dtype: str) -> Source:
    return held((array(source) * factor).astype(SIZES[dtype]))


def dense(spec: DeltaSpec) -> np.ndarray:
    """ΔW in float64 by the formulas of the kinds (of a DoRA: product and lengths)."""
    if not spec.row.products:
        return spec.scaling * array(spec.fields["delta"])[:, None]
    made = np.ones(())
    for left, right in spec.row.products:
        made = made * (array(spec.fields[left]) @ array(spec.fields[right]))
    made = spec.scaling * made
    if "magnitude" in spec.fields:
        made = np.concatenate([made, array(spec.fields["magnitude"])[:, None]], 1)
    return made


def change(kind: str, rows: int, cols: int, rank: int, seed: int, dtype: str = "F32") -> DeltaSpec:
    rng = np.random.default_rng(seed)
    scaling = float(rng.choice([1.0, 0.5, 0.3, -2.0]))
    draw = lambda *shape: held(rng.standard_normal(shape).astype(SIZES[dtype]))  # noqa: E731
    if kind == "vector":
        return DeltaSpec(kind, "m", "bias", {"delta": draw(rows)}, "vector", 0, None, scaling)
    pairs = [("lora_B", "lora_A")]
    if kind == "hadamard":
        pairs = [("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b")]
    fields: dict[str, Source] = {}
    for left, right in pairs:
        fields |= {right: draw(rank, cols), left: draw(rows, rank)}
    if kind == "dora":
        fields["magnitude"] = draw(rows)
    return DeltaSpec(kind, "m", "weight", fields, "linear", rank, scaling * rank, scaling)


KINDS = st.sampled_from(["lowrank", "dora", "hadamard", "vector"])
HEIGHTS = st.lists(st.integers(1, 5), min_size=1, max_size=4)
SEEDS = st.integers(0, 2**20)


def spans_of(heights: list[int]) -> list[tuple[int, int]]:
    ends = np.cumsum(heights).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


@settings(max_examples=60, deadline=None)
@given(KINDS, HEIGHTS, st.integers(1, 6), SEEDS)
def test_cut_rows_are_the_rows(kind: str, heights: list[int], rank: int, seed: int) -> None:
    spec = change(kind, sum(heights), 5, rank, seed)
    parts = cut(spec, spans_of(heights))
    assert parts is not None
    # The same factors; their products in float64 may be summed in another order where there is one
    # row: 6 terms of elements below 7, of a LoHa two such sums, times a scaling of at most 2.
    bound = 2.0**-52 * 6 * 2 * (6 * 7.0**2) ** 2 * 2
    assert np.abs(np.concatenate([dense(p) for p in parts]) - dense(spec)).max() <= bound


@settings(max_examples=100, deadline=None)
@given(KINDS, HEIGHTS, SEEDS, st.data())
def test_joined_changes_lie_below_each_other(
    kind: str, heights: list[int], seed: int, data: st.DataObject
) -> None:
    """Other ranks, scalings and types; missing ones change nothing."""
    parts: list[DeltaSpec | None] = []
    for i, height in enumerate(heights):
        may_lack = i > 0 and kind != "dora"
        if may_lack and data.draw(st.booleans()):
            parts.append(None)
            continue
        rank, dtype = data.draw(st.integers(1, 4)), data.draw(st.sampled_from(["F16", "F32"]))
        parts.append(change(kind, height, 5, rank, seed + i, dtype))
    made = join(parts, heights, remake)
    assert made is not None
    wanted = np.concatenate(
        [np.zeros((h, dense(parts[0]).shape[1])) if p is None else dense(p)
         for p, h in zip(parts, heights, strict=True)]
    )  # fmt: skip
    # a factor of a scaling is rounded once to float32 where scalings differ
    bound = 2.0**-23 * max(1.0, float(np.abs(wanted).max())) * 8
    assert np.abs(dense(made) - wanted).max() <= bound
    if made.rank and made.alpha is not None:
        assert made.alpha / made.rank == pytest.approx(made.scaling, rel=1e-15)


@pytest.mark.parametrize("kind", ["lowrank", "hadamard"])
def test_what_was_cut_joins_to_the_same_factors(kind: str) -> None:
    """One right factor for all parts stays one: no rank is added."""
    spec = change(kind, 12, 5, 3, 7)
    parts = cut(spec, [(0, 4), (4, 12)])
    assert parts is not None
    made = join(parts, [4, 8], remake)
    assert made is not None and made.rank == 3
    for role in spec.fields:
        assert bytes(read_bytes(made.fields[role])) == bytes(read_bytes(spec.fields[role]))


def test_factors_along_a_diagonal_are_cut_into_their_ranks() -> None:
    parts: list[DeltaSpec | None] = [
        replace(change("lowrank", 4, 5, 2, s), scaling=0.5, alpha=1.0) for s in range(3)
    ]
    whole = join(parts, [4, 4, 4], remake)
    assert whole is not None and whole.rank == 6
    again = cut(whole, [(0, 4), (4, 8), (8, 12)])
    assert again is not None
    for one, old in zip(again, parts, strict=True):
        assert old is not None
        assert one.rank == 2 and one.scaling == 0.5 and one.alpha == 1.0
        for role in old.fields:
            assert bytes(read_bytes(one.fields[role])) == bytes(read_bytes(old.fields[role]))


def test_a_rank_that_divides_is_no_diagonal() -> None:
    spec = change("lowrank", 12, 5, 6, 3)
    parts = cut(spec, [(0, 4), (4, 8), (8, 12)])
    assert parts is not None and [p.rank for p in parts] == [6, 6, 6]


def test_a_nearly_diagonal_factor_is_none() -> None:
    """One number outside of the diagonal, in neither the first row nor the last part's first."""
    parts: list[DeltaSpec | None] = [change("lowrank", 4, 5, 2, s) for s in range(3)]
    parts = [None if p is None else replace(p, scaling=1.0, alpha=2.0) for p in parts]
    whole = join(parts, [4, 4, 4], remake)
    assert whole is not None
    left = array(whole.fields["lora_B"])
    left[6, 0] = 1e-3
    fields = {**whole.fields, "lora_B": held(left.astype(np.float32))}
    cuts = cut(replace(whole, fields=fields), [(0, 4), (4, 8), (8, 12)])
    assert cuts is not None and [p.rank for p in cuts] == [6, 6, 6]


@pytest.mark.parametrize("kind", ["lowrank", "dora", "hadamard", "vector"])
def test_halves_change_places(kind: str) -> None:
    spec = change(kind, 8, 5, 3, 11)
    made = swap_halves(spec)
    assert made is not None
    rows = dense(spec)
    assert np.array_equal(dense(made), np.concatenate([rows[4:], rows[:4]]))
    assert all(made.fields[right] is spec.fields[right] for _, right in spec.row.products)


def test_a_missing_learned_length_cannot_be_made_up() -> None:
    spec = change("dora", 4, 5, 2, 1)
    assert join([spec, None], [4, 4], remake) is None
