"""Many calls of torch as one: the same numbers, and nobody waits for the interpreter."""

from __future__ import annotations

import threading
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import loratool as lt
from loratool.delta.lowrank import LowRank
from loratool.delta.placed import Placed
from loratool.engine import grid, measuring, products
from loratool.engine.products import Products, Wanted
from loratool.linalg import rounding
from loratool.linalg.one_call import OneCall
from loratool.plan import Region, Span
from tests.make import randn, random_factors, save_adapter, save_checkpoint

ALL: list[OneCall[..., object]] = [
    products._add, products._bound, products._look, products._merge,
    measuring._square, measuring._sums, rounding._ulp, rounding._expected_rounding,
]  # fmt: skip


@OneCall
def wait_for(flag: Tensor, turns: int) -> bool:
    """Whether it is set before so many looks at it."""
    left = turns
    while left > 0 and int(flag) == 0:
        left -= 1
    return left > 0


@pytest.mark.parametrize("one", [*ALL, wait_for], ids=lambda one: one.__name__)
def test_torch_knows_the_language(one: OneCall[..., object]) -> None:
    assert one._compiled is not None


def test_other_threads_go_on() -> None:
    flag, found = torch.zeros(1), []
    thread = threading.Thread(target=lambda: found.append(wait_for(flag, 20_000_000)))
    thread.start()
    flag.fill_(1.0)  # would have to wait for its end
    thread.join()
    assert found == [True]


def never(self: OneCall[..., object]) -> None:
    """As where torch has no such thing."""


def hide(*words: object) -> str:
    raise OSError("source code not available")


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_same_where_torch_cannot(
    dtype: torch.dtype, exact: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, shape = "model.layers.0.up_proj", (300, 200)
    save_checkpoint(tmp_path / "base", {f"{name}.weight": randn(*shape, seed=1).to(dtype)})
    for i in range(2):
        save_adapter(tmp_path / f"a{i}", random_factors({name: shape}, rank=4, seed=i))

    def run(out: str) -> Tensor:
        lt.merge([tmp_path / "a0", f"{tmp_path / 'a1'}:0.3"], base=tmp_path / "base",
                 output=tmp_path / out, exact=exact)  # fmt: skip
        return load_file(tmp_path / out / "model.safetensors")[f"{name}.weight"]

    together = run("together")
    for one in ALL:
        monkeypatch.setitem(one.__dict__, "_compiled", None)
    assert torch.equal(run("alone"), together)


def test_without_source(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = OneCall(wait_for.function)
    monkeypatch.setattr("inspect.getsource", hide)
    assert fresh._compiled is None
    assert fresh(torch.ones(1), 3) and not fresh(torch.zeros(1), 3)


ROWS, COLS = 70, 30


@st.composite
def regions(draw: st.DrawFn) -> Region:
    spans = []
    for size in (ROWS, COLS):
        start = draw(st.integers(0, size - 1))
        spans.append((Span(start, draw(st.integers(start + 1, size))),))
    return Region(rows=spans[0], cols=spans[1])


@given(st.lists(regions(), max_size=3), st.integers(1, 40), st.integers(1, 8))
def test_products_in_parts_of_a_matrix(places: list[Region], height: int, stride: int) -> None:
    """As the deltas themselves add to single blocks."""
    generator = torch.Generator().manual_seed(height)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def low_rank(region: Region) -> Placed:
        rows, cols = (spans[0].stop - spans[0].start for spans in (region.rows, region.cols))
        inner = LowRank(draw(rows, 3), draw(3, cols), 0.7)
        return Placed(inner, region, (ROWS, COLS), torch.device("cpu"))

    deltas, base = [low_rank(region) for region in places], draw(ROWS, COLS).bfloat16()
    starts = [*range(0, ROWS, height), ROWS]
    out, acc = torch.empty_like(base), torch.empty(1, 2 * height * COLS)
    found = Products.of(deltas, COLS)
    assert found is not None
    piece = [
        grid.Block(i, r0, r1, 0, COLS, r0 * COLS) for i, (r0, r1) in enumerate(pairwise(starts))
    ]
    wanted = Wanted.of(piece[::2], 0, stride)
    bits = base.view(-1).view(torch.int16)
    is_simple, ends, kept = found.merge(base.view(-1), bits, acc, out.view(-1), starts, wanted)
    assert is_simple
    for i, (r0, r1) in enumerate(pairwise(starts)):
        sums = base[r0:r1].float()
        for delta in deltas:
            delta.add_to(sums, sums, r0, r1, 0, COLS)
        assert torch.equal(sums.bfloat16(), out[r0:r1])
        if i % 2 == 0:
            rows = slice(-r0 % stride, None, stride)
            assert torch.equal(kept[i // 2], sums[rows])
            assert torch.equal(ends[i], base[r0:r1][rows])
            assert torch.equal(ends[i + 1], out[r0:r1][rows])


def test_regions_that_are_no_rectangles() -> None:
    gaps = Region(rows=(Span(0, 10, 2),), cols=(Span(0, 8),))
    inner = LowRank(torch.ones(5, 1), torch.ones(1, 8))
    assert Placed(inner, gaps, (20, 8), torch.device("cpu")).products() is None
    assert Products.of([inner, Placed(inner, gaps, (20, 8), torch.device("cpu"))], 8) is None
