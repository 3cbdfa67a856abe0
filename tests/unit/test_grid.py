import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratool.engine import grid

VIEWS = st.tuples(st.integers(1, 3000), st.integers(1, 200_000)).filter(
    lambda v: v[0] * v[1] < 20_000_000
)


@given(VIEWS)
def test_blocks_tile_the_view_in_byte_order(view: tuple[int, int]) -> None:
    rows, cols = view
    position = 0
    for index, block in enumerate(grid.blocks(view)):
        assert block.index == index
        assert block.start == position == block.r0 * cols + block.c0
        assert (block.c0, block.c1) == (0, cols) or block.r1 == block.r0 + 1
        position += block.numel
    assert position == rows * cols


@given(VIEWS)
def test_single_blocks_are_those_of_the_grid(view: tuple[int, int]) -> None:
    every = grid.blocks(view)
    assert grid.count_blocks(view) == len(every)
    some = {0, len(every) // 2, len(every) - 1}
    assert grid.ends_and_middle(view) == [every[i] for i in sorted(some)]


def test_long_rows_are_cut_into_cells() -> None:
    cut = grid.blocks((3, 200_000), 70_000)
    assert [(b.r0, b.c0, b.c1, b.start) for b in cut[3:6]] == [
        (1, 0, 70_000, 200_000),
        (1, 70_000, 140_000, 270_000),
        (1, 140_000, 200_000, 340_000),
    ]
    assert [b.index for b in cut] == list(range(9))


@given(VIEWS)
def test_largest_block_bounds_memory(view: tuple[int, int]) -> None:
    largest = max(b.numel for b in grid.blocks(view))
    assert largest == grid.largest_block(view)
    assert largest <= grid.MIN_ROWS * grid.WIDE_COLS


@given(VIEWS, st.integers(1, 10_000_000))
def test_chunks_keep_blocks_whole(view: tuple[int, int], size: int) -> None:
    blocks = grid.blocks(view)
    runs = grid.chunks(blocks, size)
    assert [b for run in runs for b in run] == blocks
    assert all(len(run) == 1 or sum(b.numel for b in run) <= size for run in runs)


@pytest.mark.parametrize("view", [(0, 5), (5, 0), (1, 0)])
def test_empty_tensors_have_no_blocks(view: tuple[int, int]) -> None:
    assert grid.blocks(view) == grid.ends_and_middle(view) == []
