"""What every kind of change promises, on random tensors."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratool.adapter import TensorData
from loratool.delta.base import Delta
from loratool.delta.by_rows import RowMap
from loratool.delta.forms import matrix_shape, scaled_source, shape_of
from loratool.delta.load import load_delta
from loratool.frozen import replace
from loratool.kind import any_shapes
from loratool.kinds import KINDS, Kind, of_method, of_roles, row_of
from loratool.plan import DeltaPart, Region
from loratool.plugins import function_of
from tests.make import randn
from tests.strategies import SPECS, Change, spans

ROWS = [pytest.param(k, id=k.name) for k in KINDS]
FULL = torch.float64
EPS = 2.0**-52


def test_every_kind_has_random_changes() -> None:
    assert set(SPECS) == {k.name for k in KINDS}


@pytest.mark.parametrize("row", ROWS)
def test_a_row_resolves(row: Kind) -> None:
    assert row_of(row.name) is row
    assert callable(function_of(row.implementation))
    assert not row.pairs or callable(function_of(row.pairs))
    assert row.scaled in row.roles and row.reach in ("block", "rows", "norms", "all")
    assert not set(row.roles) & set(row.optional)
    assert row.rank_axis is None or row.rank_axis[0] in row.roles
    assert set(row.stand_ins) <= set(row.roles) and row.scaled in row.roles
    assert bool(row.pairs) >= row.has_factors


@pytest.mark.parametrize("row", ROWS)
def test_its_roles_and_its_method_are_its_own(row: Kind) -> None:
    assert of_roles(row.roles) is row and of_roles({*row.roles, *row.optional}) is row
    assert not row.method or of_method(row.method) is row
    for role, factors in row.stand_ins.items():
        given = {*row.roles, *factors}
        assert of_roles(given - {role}) is row and of_roles(given) is None
        assert of_roles(given - {role, factors[1]}) is not row


def each(row: Kind, holds: Callable[[Change, st.DataObject], None]) -> None:
    """Try a law on random changes."""

    @settings(max_examples=25, deadline=None)
    @given(SPECS[row.name], st.data())
    def run(change: Change, data: st.DataObject) -> None:
        assert change.spec.kind == row.name
        holds(change, data)

    run()


def built(change: Change, *, dtype: torch.dtype = FULL, fold: bool = True, **part: Any) -> Delta:
    """The delta as merging builds it, at the spec's own scaling."""
    made = DeltaPart(change.spec, part.pop("weight", 1.0), **part)
    tensors = {id(s): change.fields[role] for role, s in change.spec.fields.items()}
    coefficient = change.spec.scaling * made.weight
    return load_delta(
        made, lambda source: tensors[id(source)], coefficient=coefficient, dtype=dtype, fold=fold
    )


def weight_of(change: Change) -> torch.Tensor:
    return randn(*change.shape, seed=99).double()


def effect(delta: Delta, weight: torch.Tensor) -> torch.Tensor:
    """W' - W."""
    return delta.apply_to(weight) - weight


def close(one: torch.Tensor, other: torch.Tensor, *, unit: float = EPS) -> bool:
    """Equal within some hundred roundings of the largest value."""
    size = max(float(one.abs().max()), float(other.abs().max()), 1.0)
    return bool(((one - other).abs() <= 512 * unit * size).all())


@pytest.mark.parametrize("row", ROWS)
def test_sizes_are_those_of_the_dense_change(row: Kind) -> None:
    def holds(change: Change, _: st.DataObject) -> None:
        out, inner = row.sizes(change.spec)
        assert (out, int(torch.Size(inner).numel())) == (
            change.shape if row.is_matrix else (change.shape[1], 1)
        )
        assert built(change).shape == change.shape
        assert shape_of(change.spec) == (change.shape if row.is_matrix else change.shape[1:])
        assert not row.is_matrix or matrix_shape(change.spec) == change.shape
        place = row.rank_in(change.fields)
        if place is not None and change.spec.blocks is None:
            assert change.fields[place[0]].shape[place[1]] == change.spec.rank

    each(row, holds)


def pairs(change: Change) -> list[tuple[torch.Tensor, torch.Tensor]]:
    found: list[tuple[torch.Tensor, torch.Tensor]] = function_of(change.spec.row.pairs)(
        change.fields, change.spec
    )
    return found


@pytest.mark.parametrize("row", [k for k in KINDS if k.pairs], ids=lambda k: k.name)
def test_thin_factors_have_the_rank_that_the_row_says(row: Kind) -> None:
    def holds(change: Change, _: st.DataObject) -> None:
        ((left, right),) = pairs(change)
        assert left.shape[1] == right.shape[0] == change.spec.product_rank
        assert (left.shape[0], right.shape[1]) == change.shape
        if row.has_factors:
            product = change.spec.scaling * left @ right
            dense = built(change).dense()
            assert close(product, dense)
            assert int(torch.linalg.matrix_rank(dense)) <= change.spec.product_rank

    each(row, holds)


@pytest.mark.parametrize("row", ROWS)
def test_blocks_give_the_whole(row: Kind) -> None:
    def holds(change: Change, data: st.DataObject) -> None:
        weight, whole = weight_of(change), built(change).apply_to(weight_of(change))
        (rows, cols), delta = change.shape, built(change)
        height, width = data.draw(st.integers(1, rows)), data.draw(st.integers(1, cols))
        places = [(r, min(r + height, rows), c, min(c + width, cols))
                  for r in range(0, rows, height) for c in range(0, cols, width)]  # fmt: skip
        assert delta.needs_measure == (row.reach == "norms")
        assert delta.needs_rows == (row.reach == "rows")
        if delta.needs_rows:
            delta.attach(lambda start, stop: weight[start:stop])
        for r0, r1, c0, c1 in data.draw(st.permutations(places)) if delta.needs_measure else ():
            delta.measure(weight[r0:r1, c0:c1], r0, r1, c0, c1)
        out = weight.clone()
        for r0, r1, c0, c1 in data.draw(st.permutations(places)):
            delta.add_to(out[r0:r1, c0:c1], weight[r0:r1, c0:c1], r0, r1, c0, c1)
        assert close(out, whole)

    each(row, holds)


@pytest.mark.parametrize("row", ROWS)
def test_additive_means_that_the_base_does_not_matter(row: Kind) -> None:
    seen: list[bool] = []

    def holds(change: Change, _: st.DataObject) -> None:
        delta, weight = built(change), weight_of(change)
        assert delta.is_additive == row.is_additive == change.spec.is_additive
        one, other = effect(delta, weight), effect(built(change), 3 * weight)
        assert not row.is_additive or (close(one, other) and close(one, delta.dense()))
        seen.append(close(one, other))

    each(row, holds)
    assert all(seen) == row.is_additive


@pytest.mark.parametrize("row", ROWS)
def test_scaled_is_so_many_times_the_change(row: Kind) -> None:
    def holds(change: Change, data: st.DataObject) -> None:
        factor, weight = data.draw(st.sampled_from([-2.0, 0.25, 3.0])), weight_of(change)
        want = effect(built(change, weight=factor), weight)
        if row.is_proportional:
            assert close(want, factor * effect(built(change), weight))
        for fold in (True, False):
            assert close(effect(built(change, fold=fold).scaled(factor), weight), want)

    each(row, holds)


SCALED = [k for k in KINDS if k.is_additive and k.takes_factor]


@pytest.mark.parametrize("row", SCALED, ids=lambda k: k.name)
def test_the_scaled_role_multiplies_the_change(row: Kind) -> None:
    def holds(change: Change, _: st.DataObject) -> None:
        (role,) = [r for r, s in change.spec.fields.items() if s is scaled_source(change.spec)]
        assert role == row.scaled_in(change.fields)
        for factor in (-2.0, 0.0):
            fields = {**change.fields, role: factor * change.fields[role]}
            assert close(built(replace(change, fields=fields)).dense(),
                         factor * built(change).dense())  # fmt: skip

    each(row, holds)


@pytest.mark.parametrize("row", ROWS)
def test_orientation_and_slices(row: Kind) -> None:
    """A base that stores (in, out), and a part of the change alone, as fused tensors take it."""

    def holds(change: Change, data: st.DataObject) -> None:
        if not row.is_additive:
            return
        dense = built(change).dense()
        rows, cols = (data.draw(spans(n)) for n in dense.shape)
        if not row.is_matrix:
            part = built(change, region=Region(source_cols=cols)).dense()
            assert close(part, dense[:, cols[0] : cols[1]])
            return
        region = Region(source_rows=rows, source_cols=cols)
        part = built(change, region=region).dense()
        assert close(part, dense[rows[0] : rows[1], cols[0] : cols[1]])
        turned = built(change, transposed=True, region=Region(source_rows=cols, source_cols=rows))
        assert close(turned.dense(), part.T) and close(built(change, transposed=True).dense(),
                                                       dense.T)  # fmt: skip

    each(row, holds)


@pytest.mark.parametrize("row", [k for k in KINDS if not k.is_additive and k.is_matrix],
                         ids=lambda k: k.name)  # fmt: skip
def test_orientation_and_whole_groups_of_rows(row: Kind) -> None:
    """Of what depends on W: on one that is stored (in, out), and on some rows of it alone."""

    def holds(change: Change, data: st.DataObject) -> None:
        weight = weight_of(change)
        whole = effect(built(change), weight)
        assert close(effect(built(change, transposed=True), weight.T.contiguous()).T, whole)
        step = row.together(change.spec)
        if row.reach not in ("block", "rows") or not step:
            return
        first, last = (step * n for n in data.draw(spans(len(weight) // step)))
        part = built(change, region=Region(source_rows=(first, last)))
        assert part.shape == (last - first, change.shape[1])
        assert close(effect(part, weight[first:last]), whole[first:last])

    each(row, holds)


@pytest.mark.parametrize("row", ROWS)
def test_sizes_of_terms_are_no_less_than_the_change(row: Kind) -> None:
    """`verify` takes them for the bound of what other roundings may do."""

    def holds(change: Change, _: st.DataObject) -> None:
        delta, weight = built(change), weight_of(change)
        moved = effect(delta, weight)
        size = torch.zeros_like(weight)
        delta.add_size(size, weight, 0, len(weight), 0, weight.shape[1])
        assert (moved.abs() <= size * (1 + 2.0**-40) + 2.0**-40 * weight.abs()).all()

    each(row, holds)


@pytest.mark.parametrize("row", ROWS)
def test_terms_add_up_exactly(row: Kind) -> None:
    """Where `is_sum` says so: to the change of exact arithmetic, within the stated size."""

    def holds(change: Change, data: st.DataObject) -> None:
        if not change.spec.is_sum:
            return
        scaling, whole = data.draw(st.sampled_from([1.0, 1 / 3, -0.7])), whole_numbers(change)
        change = replace(whole, spec=replace(whole.spec, scaling=scaling))
        plain = built(replace(whole, spec=replace(whole.spec, scaling=1.0))).dense().flatten()
        delta, (rows, cols) = built(change, fold=False), change.shape
        at = torch.cartesian_prod(torch.arange(rows), torch.arange(cols)).view(-1, 2)
        terms = delta.terms(at[:, 0], at[:, 1], torch.zeros(len(at), dtype=FULL))
        sums = [sum(map(Fraction, line), Fraction(0)) for line in terms.tolist()]
        assert sums == [Fraction(scaling) * Fraction(x) for x in plain.tolist()]
        size = torch.zeros(change.shape, dtype=FULL)
        delta.add_size(size, size, 0, rows, 0, cols)
        near = built(change).dense().flatten().tolist()
        for total, value, limit in zip(sums, near, size.flatten().tolist(), strict=True):
            assert abs(float(total) - value) <= 64 * EPS * limit
            assert abs(float(total)) <= limit * (1 + 64 * EPS)

    each(row, holds)


def whole_numbers(change: Change) -> Change:
    """With tensors of whole numbers of at most 11 bits, whose sums of products float64 holds."""
    fields = {role: (256 * t).round().clamp(-2047, 2047) if t.is_floating_point() else t
              for role, t in change.fields.items()}  # fmt: skip
    return replace(change, fields=fields)


@pytest.mark.parametrize("row", ROWS)
def test_float32_is_as_near_as_its_roundings(row: Kind) -> None:
    def holds(change: Change, _: st.DataObject) -> None:
        weight = weight_of(change).float()
        want = effect(built(change), weight.double())
        delta = built(change, dtype=torch.float32)
        got = delta.apply_to(weight).double() - weight.double()
        assert delta.roundings > 0
        assert close(got, want, unit=2.0**-24)

    each(row, holds)


@pytest.mark.parametrize("row", ROWS)
def test_moving_changes_nothing(row: Kind) -> None:
    def holds(change: Change, _: st.DataObject) -> None:
        moved, weight = built(change), weight_of(change)
        moved.to(torch.device("cpu"))
        assert torch.equal(effect(moved, weight), effect(built(change), weight))
        moved = built(change)
        moved.to(torch.device("meta"))
        left = [t for t in tensors_of(moved) if t.device.type != "meta"]
        assert not left

    each(row, holds)


def tensors_of(delta: Delta | RowMap) -> list[torch.Tensor]:
    """All tensors that a delta holds, those of deltas inside it too."""
    found = []
    for value in vars(delta).values():
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (Delta, RowMap)):
            found += tensors_of(value)
    return found


@pytest.mark.parametrize("row", ROWS)
def test_shapes_that_do_not_fit_are_seen(row: Kind) -> None:
    """By kinds that say how; the others are checked where their files are read."""

    def holds(change: Change, data: st.DataObject) -> None:
        assert row.fits(change.spec)
        if row.fits is any_shapes:
            return
        lengths = {(r, change.fields[r].shape.index(change.fields[r].numel()))
                   for r in change.fields if r.startswith("magnitude")}  # fmt: skip
        # LoRA is checked elsewhere; the rank of MiSS is in one tensor alone.
        ranks = {row.rank_in(change.fields)} - {None, ("lora_A", 0), ("miss_block", 0)}
        if not lengths | ranks:  # matrices stored whole fit any
            return
        role, axis = data.draw(st.sampled_from(sorted(lengths | ranks)))  # type: ignore[type-var]
        old = change.spec.fields[role]
        shape = tuple(n + (i == axis) for i, n in enumerate(old.shape))
        longer = TensorData(role, "F32", shape, b"")
        spec = replace(change.spec, fields={**change.spec.fields, role: longer})
        assert not row.fits(spec)

    each(row, holds)
