"""Fused and separate projections: a change cut into rows, and changes put below each other.

Both are exact.  Rows of B @ A are rows of B, so a part of a change copies A; changes below each
other have their factors along a diagonal, so that ranks add up.  No torch: bytes are moved.

    [B1 A1]   [B1    ] [A1]
    [B2 A2] = [    B2] [A2]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from loratool.adapter import (
    ArrangedRef,
    CodedRef,
    DeltaSpec,
    JoinedRef,
    Source,
    TensorData,
    TensorRef,
)
from loratool.delta.forms import side_sizes
from loratool.dtypes import DTYPES, exact_dtype, numel, widest
from loratool.frozen import replace
from loratool.store.reader import read_bytes

Span = tuple[int, int]
"""(first, stop) of rows."""
Remake = Callable[[Source, float, str], Source]
"""A tensor times a factor, in a type."""


def is_cuttable(spec: DeltaSpec) -> bool:
    """True if rows of the change are rows of its tensors."""
    row = spec.row
    known = {*row.row_roles, *(role for pair in row.products for role in pair)}
    is_plain = not spec.transposed and spec.blocks is None and not spec.base_change
    return is_plain and spec.layout in ("linear", "vector") and known >= set(spec.fields)


def rows_together(spec: DeltaSpec) -> int:
    """How many rows of a change a cut must leave together: 1 = any rows, 0 = it cannot be cut."""
    role = _block_role(spec)
    if is_cuttable(spec) or not role:
        return int(is_cuttable(spec))
    is_plain = spec.layout == "linear" and not spec.transposed and not spec.base_change
    return side_sizes(spec)[0] // spec.fields[role].shape[0] if is_plain else 0


def _block_role(spec: DeltaSpec) -> str:
    role = spec.row.block_role
    return role if role in spec.fields or not role else spec.row.stand_ins[role][0]


def cut(spec: DeltaSpec, spans: Sequence[Span]) -> list[DeltaSpec] | None:
    """The rows of a change, one new change for each span; None if they cannot be told apart.

    A product whose factors lie along a diagonal gives each part its own ranks.

    Args:
        spec: a change of a matrix (out, in) or of a vector.
        spans: of rows, in their order and without gaps.
    """
    parts = [part for span in spans if (part := gather(spec, [span])) is not None]
    if len(parts) < len(spans):
        return None
    rank, rest = divmod(spec.rank, len(spans))
    if rest or len(spec.row.products) != 1 or not _is_diagonal(spec, spans, rank):
        return parts
    return [_block_of(part, i * rank, rank) for i, part in enumerate(parts)]


def join(
    parts: Sequence[DeltaSpec | None], heights: Sequence[int], remake: Remake
) -> DeltaSpec | None:
    """One change of changes below each other; None if they are not of one kind that can be.

    Args:
        parts: in the order of rows; None = nothing changes there.
        heights: rows of each.
        remake: multiplies a factor, where scalings differ, and widens types, where those do.
    """
    there = [p for p in parts if p is not None]
    first = there[0]
    row = first.row
    if any(p.kind != first.kind or not is_cuttable(p) for p in there):
        return None
    if any(_inner(p) != _inner(first) for p in there) or (row.row_roles and row.products
                                                          and len(there) < len(parts)):  # fmt: skip
        return None  # a length that is learned has no neutral value
    scaling = first.scaling if len({p.scaling for p in there}) == 1 else 1.0
    ratios = [1.0 if p is None or p.scaling == scaling else p.scaling / scaling for p in parts]
    evened = [p and _evened(p, ratio, remake) for p, ratio in zip(parts, ratios, strict=True)]
    even = [p for p in evened if p is not None]
    types = {role: widest([p.fields[role].dtype for p in even]) for role in first.fields}
    even_parts = [None if p is None else _of_types(p, types, remake) for p in evened]
    is_shared = bool(row.products) and _share_right(even_parts)
    fields: dict[str, Source] = {}
    for role in first.fields:
        sources = [None if p is None else p.fields[role] for p in even_parts]
        if role in row.row_roles:
            fields[role] = _below(sources, heights, types[role])
        elif any(role == right for _, right in row.products):
            kept = [s for s in sources if s is not None]
            fields[role] = kept[0] if is_shared else _below(kept, [s.shape[0] for s in kept], "")
        elif is_shared:
            fields[role] = _below(sources, heights, types[role])
        else:
            fields[role] = _diagonal(sources, heights, types[role])
    rank = 0 if not row.products else first.rank if is_shared else sum(p.rank for p in there)
    return replace(first, fields=fields, rank=rank, alpha=scaling * rank if rank else None,
                   scaling=scaling)  # fmt: skip


def swap_halves(spec: DeltaSpec) -> DeltaSpec | None:
    """The change with the halves of its rows in each other's place; None if that cannot be."""
    rows = side_sizes(spec)[0]
    return gather(spec, [(rows // 2, rows), (0, rows // 2)])


def gather(spec: DeltaSpec, spans: Sequence[Span]) -> DeltaSpec | None:
    """Rows of a change, in the order of the spans; None if they cannot be told apart."""
    height = rows_together(spec)
    if not height or any(edge % height for span in spans for edge in span):
        return None
    lefts = {left for left, _ in spec.row.products} | set(spec.row.row_roles)
    lefts |= {_block_role(spec)} if height > 1 or not is_cuttable(spec) else set()
    own = [(a // height, b // height) for a, b in spans]
    fields = {
        role: take_rows(source, own) if role in lefts else source
        for role, source in spec.fields.items()
    }
    return replace(spec, fields=fields)


def take_rows(source: Source, spans: Sequence[Span]) -> Source:
    """Rows of a tensor: a place in its file if they lie side by side."""
    parts = [rows_of(source, *span) for span in spans]
    if len(parts) == 1:
        return parts[0]
    data = b"".join(bytes(read_bytes(part)) for part in parts)
    shape = (sum(b - a for a, b in spans), *source.shape[1:])
    return TensorData(source.name, source.dtype, shape, data)


def rows_of(source: Source, start: int, stop: int) -> Source:
    """Rows of a tensor: a place in its file, or bytes of it."""
    each = source.nbytes // source.shape[0]
    shape = (stop - start, *source.shape[1:])
    if isinstance(source, (ArrangedRef, CodedRef, JoinedRef)):
        source = TensorData(source.name, source.dtype, source.shape, read_bytes(source))
    if isinstance(source, TensorRef):
        place = source.start + start * each
        return replace(source, shape=shape, start=place, nbytes=(stop - start) * each)
    data = memoryview(source.data).cast("B")[start * each : stop * each]
    return replace(source, shape=shape, data=data)


# --------------------------------------------------------------------------------------- cutting


def _is_diagonal(spec: DeltaSpec, spans: Sequence[Span], rank: int) -> bool:
    """True if the left factor is zero but for its ranks i·r … (i+1)·r in the rows of span i."""
    left = spec.fields[spec.row.products[0][0]]
    item, wide = DTYPES[left.dtype].bits // 8, spec.rank
    is_blank = isinstance(left, TensorData) and not left.data
    if rank < 1 or len(spans) < 2 or left.numel != left.shape[0] * wide or is_blank:
        return False
    last, first = _row_bytes(left, spans[-1][0], item * wide), _row_bytes(left, 0, item * wide)
    if any(first[rank * item :]) or any(last[: (len(spans) - 1) * rank * item]):
        return False  # most files are told by these rows, and no more is read
    data = memoryview(read_bytes(left)).cast("B")
    step = item * wide
    for i, (start, stop) in enumerate(spans):
        before, after = i * rank * item, (i + 1) * rank * item
        for at in range(start * step, stop * step, step):
            if any(data[at : at + before]) or any(data[at + after : at + step]):
                return False
    return True


def _row_bytes(source: Source, row: int, size: int) -> bytes:
    return bytes(memoryview(read_bytes(rows_of(source, row, row + 1))).cast("B")[:size])


def _block_of(part: DeltaSpec, first: int, rank: int) -> DeltaSpec:
    """A part with its own ranks alone."""
    ((left, right),) = part.row.products
    source = part.fields[left]
    item, wide = DTYPES[source.dtype].bits // 8, part.rank
    data = memoryview(read_bytes(source)).cast("B")
    step = item * wide
    columns = b"".join(
        data[at + first * item : at + (first + rank) * item] for at in range(0, len(data), step)
    )
    made = TensorData(
        source.name, source.dtype, (source.shape[0], rank, *source.shape[2:]), columns
    )
    fields = {**part.fields, left: made,
              right: rows_of(part.fields[right], first, first + rank)}  # fmt: skip
    alpha = None if part.alpha is None else part.scaling * rank
    return replace(part, fields=fields, rank=rank, alpha=alpha)


# --------------------------------------------------------------------------------------- joining


def _inner(spec: DeltaSpec) -> tuple[int, ...]:
    return side_sizes(spec)[1]


def _evened(part: DeltaSpec, factor: float, remake: Remake) -> DeltaSpec:
    """The same change with a factor of its scaling in its tensors."""
    if factor == 1.0:
        return part
    role = part.row.products[0][0] if part.row.products else part.row.row_roles[0]
    source = part.fields[role]
    made = remake(source, factor, exact_dtype([source.dtype, "F32"]))
    return replace(part, fields={**part.fields, role: made})


def _of_types(part: DeltaSpec, types: dict[str, str], remake: Remake) -> DeltaSpec:
    fields = {
        role: source if source.dtype == types[role] else remake(source, 1.0, types[role])
        for role, source in part.fields.items()
    }
    return replace(part, fields=fields)


def _share_right(parts: Sequence[DeltaSpec | None]) -> bool:
    """True if all right factors are the same numbers: what a fused change was cut into."""
    there = [p for p in parts if p is not None]
    for _, right in there[0].row.products:
        sources = [p.fields[right] for p in there]
        if any(s.shape != sources[0].shape for s in sources):
            return False
        if all(s == sources[0] for s in sources):
            continue
        data = bytes(read_bytes(sources[0]))
        if any(bytes(read_bytes(s)) != data for s in sources[1:]):
            return False
    return len(there) > 1


def _below(sources: Sequence[Source | None], heights: Sequence[int], dtype: str) -> TensorData:
    """Tensors below each other; zeros where there is none."""
    first = next(s for s in sources if s is not None)
    each = first.nbytes // first.shape[0]
    data = bytearray()
    for source, height in zip(sources, heights, strict=True):
        data += bytes(height * each) if source is None else bytes(read_bytes(source))
    shape = (sum(heights), *first.shape[1:])
    return TensorData(first.name, dtype or first.dtype, shape, bytes(data))


def _diagonal(sources: Sequence[Source | None], heights: Sequence[int], dtype: str) -> TensorData:
    """Left factors along a diagonal."""
    first = next(s for s in sources if s is not None)
    wide = sum(s.shape[1] for s in sources if s is not None)
    item = DTYPES[dtype].bits // 8
    tail = numel(first.shape[2:])
    step, data, before = wide * item * tail, bytearray(), 0
    for source, height in zip(sources, heights, strict=True):
        if source is None:
            data += bytes(height * step)
            continue
        own = source.shape[1] * item * tail
        raw = memoryview(read_bytes(source)).cast("B")
        left, right = bytes(before), bytes(step - before - own)
        for at in range(0, height * own, own):
            data += left
            data += raw[at : at + own]
            data += right
        before += own
    return TensorData(first.name, dtype, (sum(heights), wide, *first.shape[2:]), bytes(data))
