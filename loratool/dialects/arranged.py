"""Tensors that other programs lay out otherwise: the same numbers, their axes exchanged."""

from __future__ import annotations

from collections.abc import Sequence

from loratool.adapter import ArrangedRef, CodedRef, JoinedRef, Source, TensorData, TensorRef
from loratool.dtypes import DTYPES
from loratool.frozen import replace
from loratool.store.axes import arrange
from loratool.store.reader import read_bytes


def arranged(
    source: Source, laid: Sequence[int], axes: Sequence[int], shape: Sequence[int] | None = None
) -> Source:
    """A tensor with the axes of its numbers exchanged; nothing is read of a plain one in a file.

    Args:
        source: any tensor.
        laid: its numbers as an array of these sizes.
        axes: which of them comes first, second … in the result.
        shape: of the result; None = the sizes in their new order.
    """
    sizes = tuple(laid[axis] for axis in axes)
    final = sizes if shape is None else tuple(shape)
    if isinstance(source, TensorData):
        size = DTYPES[source.dtype].bits // 8
        old = memoryview(source.data)
        data = bytes(arrange(old, laid, axes, size)) if old.nbytes == source.nbytes else b""
        return replace(source, shape=final, data=data)
    if isinstance(source, ArrangedRef) and _undoes(source, laid, axes):
        return TensorRef(source.file, source.name, source.dtype, final, source.start,
                         source.nbytes, source.stamp)  # fmt: skip
    if isinstance(source, (ArrangedRef, CodedRef, JoinedRef)):
        held = TensorData(source.name, source.dtype, source.shape, read_bytes(source))
        return arranged(held, laid, axes, shape)
    return ArrangedRef(
        source.file, source.name, source.dtype, final, source.start, source.nbytes, source.stamp,
        laid=tuple(laid), axes=tuple(axes),
    )  # fmt: skip


def as_stored(ref: TensorRef) -> TensorRef:
    """A tensor as its file has it, if its axes were exchanged to one of the same shape."""
    if not isinstance(ref, ArrangedRef):
        return ref
    return TensorRef(ref.file, ref.name, ref.dtype, ref.shape, ref.start, ref.nbytes, ref.stamp)


def _undoes(ref: ArrangedRef, laid: Sequence[int], axes: Sequence[int]) -> bool:
    """True if exchanging axes again gives the numbers as the file has them."""
    now = tuple(ref.laid[axis] for axis in ref.axes)
    return now == tuple(laid) and [ref.axes[axis] for axis in axes] == list(range(len(axes)))
