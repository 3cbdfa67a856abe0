"""Tensors of one layout of an image or video model, seen as those of another.

What the maps of `loratool.archs` pair for adapters they pair for checkpoints too: a tensor of the
one is a tensor of the other, rows of one, several joined, or one with its halves or axes exchanged.
Nothing is computed, so that all of it is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cache

from loratool.adapter import ArrangedRef, CodedRef, JoinedRef, TensorRef
from loratool.archs.families import Guess, family_of, module_shapes
from loratool.archs.family_rows import cut, holds_for
from loratool.archs.flat import Meaning, flat_names
from loratool.archs.places import places, split_component
from loratool.archs.stated import model_type
from loratool.dtypes import numel
from loratool.frozen import Frozen, replace
from loratool.store.checkpoint import Checkpoint

Rows = tuple[int, int]
"""(first, stop)."""


class Piece(Frozen):
    """Rows of a change, or of a tensor in one layout, and where the other layout has them.

    Attributes:
        tensor: number of the one in which they lie.
        place: where in it; None = all of it.
        source: which rows they are; None = all.
    """

    tensor: int
    place: Rows | None
    source: Rows | None


class Seen(Frozen):
    """A checkpoint in the layout of another one.

    Attributes:
        tensors: by the other's names; what these do not use stays under its own.
        unnamed: names of the other that no map has, such as those of a VAE.
        absent: component of the other -> how many tensors, where it has none of them.
    """

    tensors: Mapping[str, TensorRef]
    unnamed: tuple[str, ...]
    absent: Mapping[str, tuple[str, ...]]


def pieces_of(meaning: Meaning, heights: Sequence[int], rows: int, width: int) -> Iterator[Piece]:
    """Cut some parts of a whole along the tensors that hold them; in the order of their rows.

    Args:
        meaning: which parts, and who holds them.
        heights: rows of the tensors.
        rows: of the parts.
        width: columns of the weight.

    Raises:
        ValueError: heights that do not fit together.
    """
    if holds_for(meaning.swap, heights[0], width):
        yield from _halves(rows, heights[0])
        return
    sizes = [0] * len(meaning.split)
    starts: list[dict[int, Rows]] = []  # part -> where it lies in its tensor
    for (first, stop), height in zip(meaning.holds, heights, strict=True):
        spans = cut(meaning.split[first:stop] if stop - first > 1 else "*", height, width)
        sizes[first:stop] = [b - a for a, b in spans]
        starts.append(dict(zip(range(first, stop), spans, strict=True)))
    first, stop = meaning.wanted
    if sum(sizes[first:stop]) != rows:
        raise ValueError(f"{sum(sizes[first:stop])} rows")
    for i, parts in enumerate(starts):
        own = [part for part in parts if first <= part < stop]
        start, end = parts[own[0]][0], parts[own[-1]][1]
        source = sum(sizes[first : own[0]])
        span = (source, source + end - start)
        yield Piece(i, None if end - start == heights[i] else (start, end),
                    None if span == (0, rows) else span)  # fmt: skip


def _halves(rows: int, height: int) -> Iterator[Piece]:
    if rows != height or rows % 2:
        raise ValueError(f"{height} rows")
    half = rows // 2
    yield Piece(0, (half, rows), (0, half))
    yield Piece(0, (0, half), (half, rows))


def width_of(name: str, tensors: Collection[str], shape: Callable[[str], Sequence[int]]) -> int:
    """Columns of a weight, or of the weight beside a bias; 0 if there is none."""
    for one in (name, f"{name.rpartition('.')[0]}.weight"):
        if one in tensors and len(shape(one)) > 1:
            return shape(one)[1]
    return 0


def in_layout_of(one: Checkpoint, other: Checkpoint) -> Seen | None:
    """The tensors of a checkpoint under the names, and in the form, that another one has for them.

    Args:
        one: the checkpoint.
        other: whose layout is wanted.

    Returns:
        None where they have the same names, or are no image or video model that is known.
    """
    loose = [name for name in other.tensors if name not in one.tensors]
    if not loose or model_type(one.config) or model_type(other.config):
        return None
    guess = _guess(other)
    if guess.family is None and not guess.others and not guess.parts:
        return None
    index = flat_names(one.tensors)
    of_family = cache(lambda: flat_names(one.tensors, guess.family or _guess(one).family))
    found: dict[str, TensorRef] = {}
    used: set[str] = set()
    unnamed: list[str] = []
    lost: dict[str, list[str]] = {}
    for name in loose:
        component, rest = split_component(name)
        module, _, parameter = rest.rpartition(".")
        meanings = index.look_up(component, module, parameter)
        if len(meanings) > 1:
            meanings = of_family().look_up(component, module, parameter)
        ref = seen_in(meanings[0], other.tensors[name], one.tensors) if len(meanings) == 1 else None
        if ref is not None:
            found[name] = ref
            used.update(meanings[0].names)
        elif meanings or places(component, module, parameter):
            lost.setdefault(component, []).append(name)
        else:
            unnamed.append(name)
    if not found:
        return None
    have = {
        split_component(name)[0] for name in other.tensors if name in found or name not in loose
    }
    absent = {part: tuple(names) for part, names in lost.items() if part not in have}
    rest_of_it = {name: ref for name, ref in one.tensors.items() if name not in used}
    tensors = {name: found[name] for name in other.tensors if name in found} | rest_of_it
    return Seen(tensors, tuple(unnamed), absent)


def _guess(checkpoint: Checkpoint) -> Guess:
    return family_of(module_shapes((n, ref.shape) for n, ref in checkpoint.tensors.items()))


def seen_in(
    meaning: Meaning, want: TensorRef, tensors: Mapping[str, TensorRef]
) -> TensorRef | None:
    """What a name stands for among the tensors of another layout; None if that does not fit.

    Args:
        meaning: of the name.
        want: a tensor of the shape that it has in its own layout.
        tensors: of the other one.
    """
    refs = [tensors[name] for name in meaning.names]
    first = refs[0]
    if not meaning.holds:
        return shaped(first, want.shape)
    if meaning.swap == "axes":
        return turned(first) if len(first.shape) == 2 else None
    if len({(ref.dtype, ref.shape[1:]) for ref in refs}) > 1 or not all(ref.shape for ref in refs):
        return None
    width = width_of(meaning.names[0], tensors, lambda name: tensors[name].shape)
    try:
        pieces = list(pieces_of(meaning, [r.shape[0] for r in refs], want.shape[0], width))
    except ValueError:
        return None
    return joined(want.name, [(refs[p.tensor], p.place) for p in pieces])


def shaped(ref: TensorRef, shape: tuple[int, ...]) -> TensorRef:
    """A tensor in the shape that another layout has for it, where that is but another shape.

    A 1×1 convolution is a linear layer, and a table may be stored as one row.
    """
    sides = [tuple(size for size in one if size != 1) for one in (ref.shape, shape)]
    is_row = min(map(len, sides)) <= 1 and numel(ref.shape) == numel(shape)
    if shape == ref.shape or not (is_row or sides[0] == sides[1]):
        return ref
    plain = joined(ref.name, [(ref, None)]) if isinstance(ref, CodedRef) else ref
    return replace(plain, shape=shape)


def joined(name: str, rows: Sequence[tuple[TensorRef, Rows | None]]) -> TensorRef:
    """Rows of tensors of one type and width, one after another, as a tensor; None = all rows."""
    pieces = []
    for ref, span in rows:
        each = ref.nbytes // ref.shape[0] if ref.shape[0] else 0
        start, stop = span or (0, ref.shape[0])
        pieces.append((ref, start * each, (stop - start) * each))
    first, total = rows[0][0], sum(nbytes for _, _, nbytes in pieces)
    row = first.nbytes // first.shape[0] if first.shape[0] else 0
    shape = (total // row if row else 0, *first.shape[1:])
    return JoinedRef(first.file, name, first.dtype, shape, first.start + pieces[0][1], total,
                     first.stamp, pieces=tuple(pieces))  # fmt: skip


def turned(ref: TensorRef) -> TensorRef | None:
    """A matrix with its axes exchanged; None of one that is not plain in its file."""
    if type(ref) is not TensorRef:
        return None
    return ArrangedRef(ref.file, ref.name, ref.dtype, ref.shape[::-1], ref.start, ref.nbytes,
                       ref.stamp, laid=ref.shape, axes=(1, 0))  # fmt: skip
