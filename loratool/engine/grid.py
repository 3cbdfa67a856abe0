"""The fixed grid of blocks on which every sum is formed.

Matrix products over other cuts change the last bits of a sum, so the cuts depend on the shape
of the tensor alone: never on threads, buffer sizes or shards.
"""

from __future__ import annotations

from loratool.frozen import Frozen

WIDE_COLS = 1 << 16
"""Rows longer than this are cut into cells; shorter ones are taken whole."""

MIN_ROWS = 16
"""Rows in a block at least (fewer make slow products)."""

CPU_ELEMENTS = 1 << 19
"""Elements in a block on the CPU: accumulator and scratch stay in the cache."""

CUDA_ELEMENTS = 1 << 22
"""Elements in a block on a GPU: enough work for one launch."""

CPU_CHUNK_BYTES = 8 << 20
"""Bytes read and written in one piece on the CPU."""

CUDA_CHUNK_BYTES = 8 << 20
"""The same with a GPU: one block of 16-bit numbers.  Pinned memory is taken in powers of two."""

FERRY_BYTES = 16 << 20
"""Of the buffers by which a worker's input goes to a GPU at most: smaller ones mean more turns at
the interpreter's lock, which cost more than what a processor's cache saves (4 MB: a quarter)."""

SAMPLE_ELEMENTS = 1 << 21
"""Elements of a module up to which `compare` and `inspect --risk` look at every one; of larger ones
they take whole rows, evenly spread over the matrix, that hold about as many."""


class Block(Frozen):
    """A rectangle of a (rows, cols) view; its elements are contiguous.

    Attributes:
        index: position in the grid.
        r0: first row.
        r1: one past the last row.
        c0: first column.
        c1: one past the last column.
        start: flat index of the first element.
        pair: which pair of inputs, in a step that compares several.
    """

    index: int
    r0: int
    r1: int
    c0: int
    c1: int
    start: int
    pair: int = 0

    @property
    def numel(self) -> int:
        """Number of elements."""
        return (self.r1 - self.r0) * (self.c1 - self.c0)


def blocks(view: tuple[int, int], elements: int = CPU_ELEMENTS) -> list[Block]:
    """Cut a view into blocks of about ``elements`` elements, in order of their bytes."""
    return [_block(view, elements, i) for i in range(count_blocks(view, elements))]


def count_blocks(view: tuple[int, int], elements: int = CPU_ELEMENTS) -> int:
    """How many blocks `blocks` cuts a view into."""
    rows, cols = view
    if rows == 0 or cols == 0:
        return 0
    if cols > WIDE_COLS:
        return rows * -(-cols // elements)
    return -(-rows // _height(cols, elements))


def ends_and_middle(view: tuple[int, int], elements: int = CPU_ELEMENTS) -> list[Block]:
    """The first, the middle and the last of `blocks`, those of a huge view not made."""
    count = count_blocks(view, elements)
    return [_block(view, elements, i) for i in sorted({0, count // 2, count - 1})] if count else []


def _block(view: tuple[int, int], elements: int, index: int) -> Block:
    rows, cols = view
    if cols > WIDE_COLS:
        row, cell = divmod(index, -(-cols // elements))
        start = cell * elements
        stop = min(start + elements, cols)
        return Block(index, row, row + 1, start, stop, row * cols + start)
    height = _height(cols, elements)
    first = index * height
    return Block(index, first, min(first + height, rows), 0, cols, first * cols)


def _height(cols: int, elements: int) -> int:
    """Rows of a block that holds whole ones."""
    return max(MIN_ROWS, elements // cols)


def largest_block(view: tuple[int, int], elements: int = CPU_ELEMENTS) -> int:
    """Number of elements of the biggest block of a view."""
    rows, cols = view
    if cols > WIDE_COLS:
        return min(cols, elements)
    return min(rows, max(MIN_ROWS, elements // max(cols, 1))) * cols


def chunks(grid: list[Block], max_elements: int) -> list[list[Block]]:
    """Runs of neighbouring blocks that are read and written in one piece."""
    out: list[list[Block]] = []
    size = 0
    for block in grid:
        if not out or size + block.numel > max_elements:
            out.append([])
            size = 0
        out[-1].append(block)
        size += block.numel
    return out
