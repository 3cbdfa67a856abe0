"""Each kind against its closed form in float64, whole and block by block."""

from __future__ import annotations

import pytest
import torch

from loratool.adapter import DeltaSpec
from loratool.delta import lowrank, magnitude, vector
from loratool.delta.base import Delta, Loaded
from loratool.delta.placed import Placed
from loratool.plan import DeltaPart, Region, Span
from tests.make import randn

ROWS, COLS, RANK = 22, 14, 3
A = randn(RANK, COLS, seed=1).double()
B = randn(ROWS, RANK, seed=2).double()
W = randn(ROWS, COLS, seed=3).double()
M = randn(ROWS, seed=4).abs().double()


def spec(kind: str = "lowrank", scaling: float = 2.0, **more: object) -> DeltaSpec:
    return DeltaSpec(kind, "m", "weight", {}, "linear", RANK, None, scaling, **more)  # type: ignore[arg-type]


def build(module: object, fields: dict[str, torch.Tensor], part: DeltaPart) -> Delta:
    given = Loaded(fields, part, part.weight * part.spec.scaling, torch.float64)
    return module.build(given)  # type: ignore[attr-defined, no-any-return]


def by_blocks(delta: Delta, weight: torch.Tensor, height: int, width: int) -> torch.Tensor:
    rows, cols = weight.shape
    places = [
        (r, min(r + height, rows), c, min(c + width, cols))
        for r in range(0, rows, height)
        for c in range(0, cols, width)
    ]
    if delta.needs_measure:
        for r0, r1, c0, c1 in places:
            delta.measure(weight[r0:r1, c0:c1], r0, r1, c0, c1)
    out = weight.clone()
    for r0, r1, c0, c1 in places:
        acc = out[r0:r1, c0:c1].clone()
        delta.add_to(acc, weight[r0:r1, c0:c1], r0, r1, c0, c1)
        out[r0:r1, c0:c1] = acc
    return out


def dora(weight: torch.Tensor, part: torch.Tensor, m: torch.Tensor, dim: int) -> torch.Tensor:
    direction = weight + part
    return m / direction.norm(dim=dim, keepdim=True) * direction


CASES = {
    "lowrank": (lowrank, {}, DeltaPart(spec(), 0.7), W, W + 1.4 * B @ A),
    "transposed": (
        lowrank, {}, DeltaPart(spec(), 1.0, transposed=True), W.T, W.T + 2 * (B @ A).T,
    ),
    "diag": (
        lowrank, {"diag": M[:RANK]}, DeltaPart(spec(), 1.0), W,
        W + 2 * B @ torch.diag(M[:RANK]) @ A,
    ),
    "dora": (
        magnitude, {"magnitude": M}, DeltaPart(spec("dora"), 1.0), W,
        dora(W, 2 * B @ A, M[:, None], 1),
    ),
    "dora, columns": (
        magnitude, {"magnitude": M}, DeltaPart(spec("dora"), 1.0, transposed=True), W.T,
        dora(W.T, 2 * (B @ A).T, M[None], 0),
    ),
    "dora at weight 0.3": (
        magnitude, {"magnitude": M}, DeltaPart(spec("dora"), 0.3), W,
        W + 0.3 * (dora(W, 2 * B @ A, M[:, None], 1) - W),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_kind_against_closed_form(name: str) -> None:
    module, extra, part, weight, want = CASES[name]
    delta = build(module, {"lora_A": A, "lora_B": B} | extra, part)
    tolerance = 64 * 2.0**-52 * float(want.abs().max())
    assert float((delta.apply_to(weight) - want).abs().max()) <= tolerance
    for height, width in ((5, COLS), (7, 4), (1, 3)):
        fresh = build(module, {"lora_A": A, "lora_B": B} | extra, part)
        assert float((by_blocks(fresh, weight, height, width) - want).abs().max()) <= tolerance


@pytest.mark.parametrize("name", CASES)
def test_scaling_is_linear_in_the_change(name: str) -> None:
    module, extra, part, weight, want = CASES[name]
    delta = build(module, {"lora_A": A, "lora_B": B} | extra, part).scaled(-0.5)
    assert torch.allclose(delta.apply_to(weight), weight - 0.5 * (want - weight), atol=1e-12)


@pytest.mark.parametrize("name", [n for n in CASES if "dora" not in n])
def test_dense_is_the_change(name: str) -> None:
    module, extra, part, weight, want = CASES[name]
    delta = build(module, {"lora_A": A, "lora_B": B} | extra, part)
    assert torch.allclose(delta.dense(), want - weight, atol=1e-12)


def test_dora_has_no_change_of_its_own() -> None:
    part = DeltaPart(spec("dora"), 1.0)
    delta = build(magnitude, {"lora_A": A, "lora_B": B, "magnitude": M}, part)
    with pytest.raises(TypeError, match="depends on the base"):
        delta.dense()


@pytest.mark.parametrize("order", ["rank-major", "expert-major"])
@pytest.mark.parametrize("transposed", [False, True])
def test_expert_packing(order: str, transposed: bool) -> None:
    """PEFT: rows of A run expert·r + k; columns of B run k·E + expert."""
    experts = 4
    lora_A = randn(experts * RANK, COLS, seed=5).double()
    lora_B = randn(ROWS, experts * RANK, seed=6).double()
    packed = lora_B.view(ROWS, RANK, experts) if order == "rank-major" else None
    for e in range(experts):
        one = DeltaSpec(
            "lowrank", "m", "gate_up_proj", {}, "experts", RANK, None, 2.0,
            experts=experts, b_order=order,
        )  # fmt: skip
        part = DeltaPart(one, 1.0, expert=e, transposed=transposed)
        B_e = packed[:, :, e] if packed is not None else lora_B.view(ROWS, experts, RANK)[:, e]
        want = 2 * B_e @ lora_A.view(experts, RANK, COLS)[e]
        got = build(lowrank, {"lora_A": lora_A, "lora_B": lora_B}, part).dense()
        assert torch.allclose(got, want.T if transposed else want, atol=1e-12)


def test_block_diagonal_factors() -> None:
    small_A = randn(4, 5, seed=7).double()  # two blocks of (2, 5) on the diagonal of (4, 10)
    lora_B = randn(6, 4, seed=8).double()
    part = DeltaPart(spec(blocks=(2, "A")), 1.0)
    got = build(lowrank, {"lora_A": small_A, "lora_B": lora_B}, part).dense()
    want = 2 * lora_B @ torch.block_diag(small_A[:2], small_A[2:])
    assert torch.allclose(got, want, atol=1e-12)


REGIONS = {
    "rows": (Region((Span(3, 8),)), slice(3, 8), slice(None)),
    "columns": (Region((), (Span(2, 9),)), slice(None), slice(2, 9)),
    "every other column": (Region((), (Span(1, COLS, 2),)), slice(None), slice(1, COLS, 2)),
    "per head": (
        Region((Span(2, 4), Span(8, 10), Span(14, 16))),
        [2, 3, 8, 9, 14, 15],
        slice(None),
    ),
}


@pytest.mark.parametrize("name", REGIONS)
@pytest.mark.parametrize("kind", ["lowrank", "dora"])
def test_placed_touches_its_region_only(name: str, kind: str) -> None:
    region, rows, cols = REGIONS[name]
    inside = W[rows][:, cols]
    m, n = inside.shape
    fields = {"lora_A": randn(RANK, n, seed=9).double(), "lora_B": randn(m, RANK, seed=10).double()}
    module, extra = lowrank, {}
    if kind == "dora":
        module, extra = magnitude, {"magnitude": M[:m]}
    want = W.clone()
    changed = build(module, fields | extra, DeltaPart(spec(kind), 1.0)).apply_to(inside)
    index = torch.arange(ROWS)[rows][:, None], torch.arange(COLS)[cols][None]
    want[index] = changed
    for height, width in ((ROWS, COLS), (5, COLS), (1, 4)):
        inner = build(module, fields | extra, DeltaPart(spec(kind), 1.0))
        placed = Placed(inner, region, (ROWS, COLS), torch.device("cpu"))
        assert torch.allclose(by_blocks(placed, W, height, width), want, atol=1e-12)


def test_source_rows_cut_the_delta() -> None:
    part = DeltaPart(spec(), 1.0, Region(source_rows=(4, 9)))
    got = build(lowrank, {"lora_A": A, "lora_B": B}, part).dense()
    assert torch.allclose(got, (2 * B @ A)[4:9], atol=1e-12)
    part = DeltaPart(spec(), 1.0, Region(source_rows=(4, 9)), transposed=True)
    got = build(lowrank, {"lora_A": A, "lora_B": B}, part).dense()
    assert torch.allclose(got, (2 * B @ A).T[4:9], atol=1e-12)


def test_vector_and_rows() -> None:
    bias = vector.Vector(torch.arange(4.0))
    assert torch.equal(bias.apply_to(torch.ones(1, 4)), torch.arange(4.0)[None] + 1)
    index, values = torch.tensor([5, 0]), randn(2, COLS, seed=11).double()
    exact = vector.Rows((ROWS, COLS), index, values, 1.0, exact=True)
    out = by_blocks(exact, W, 3, 5)
    assert torch.equal(out[5], values[0]) and torch.equal(out[0], values[1])
    assert torch.equal(out[1:5], W[1:5]) and torch.equal(out[6:], W[6:])
    half = vector.Rows((ROWS, COLS), index, values, 0.5)
    assert torch.allclose(by_blocks(half, W, 3, 5)[5], (W[5] + values[0]) / 2)


def sums() -> dict[str, Delta]:
    """Every kind that is a sum of products, coefficients kept apart."""

    def low(m: int, n: int) -> Delta:
        fields = {"lora_A": randn(RANK, n, seed=9).double(), "lora_B": randn(m, RANK, seed=10)}
        part = DeltaPart(spec(), 0.7)
        return lowrank.build(Loaded(fields, part, 0.7, torch.float64, fold=False))

    found: dict[str, Delta] = {"lowrank": low(ROWS, COLS)}
    for name, (region, rows, cols) in REGIONS.items():
        inner = low(*W[rows][:, cols].shape)
        found[name] = Placed(inner, region, (ROWS, COLS), torch.device("cpu"))
    index, values = torch.tensor([5, 0]), randn(2, COLS, seed=11).double()
    found["token rows"] = vector.Rows((ROWS, COLS), index, values, 0.3)
    return found


@pytest.mark.parametrize("name", sums())
def test_terms_add_up_to_the_change(name: str) -> None:
    """What `--exact` sums, and its bound, against what `add_to` adds."""
    delta = sums()[name]
    rows, cols = (i.flatten() for i in torch.meshgrid(
        torch.arange(ROWS), torch.arange(COLS), indexing="ij"))  # fmt: skip
    change = delta.apply_to(W) - W
    terms = delta.terms(rows, cols, W.flatten())
    assert torch.allclose(terms.sum(1).view(ROWS, COLS), change, atol=1e-12)
    size = torch.zeros(ROWS, COLS, dtype=torch.float64)
    delta.add_size(size, W, 0, ROWS, 0, COLS)
    assert bool((size >= terms.abs().sum(1).view(ROWS, COLS) * (1 - 1e-12)).all())
    assert bool((size[change == 0] == 0).all())  # outside of a region nothing is in doubt
