"""One low-rank change for every module of a tied tensor: embeddings and heads, turned round."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from loratool.adapter import DeltaSpec, Source, TensorData
from loratool.archs.ties import is_head
from loratool.delta.forms import turned_round
from loratool.frozen import replace


def at_every_place(spec: DeltaSpec, names: Sequence[str]) -> Iterator[DeltaSpec]:
    """The spec under each of the names; the factors of an embedding are those of a head, turned.

    Args:
        spec: made from tensors in memory, under the first name.
        names: full parameter names of modules that share one tensor.
    """
    yield spec
    for name in names[1:]:
        module, _, parameter = name.rpartition(".")
        other = replace(spec, module=module, parameter=parameter)
        layout = "linear" if is_head(name) else "embedding"
        if spec.layout in ("linear", "embedding") and layout != spec.layout:
            other = turned_round(spec, replace(other, layout=layout), _turned)
        yield other


def _turned(source: Source) -> TensorData:
    """The transpose of a float32 matrix."""
    assert isinstance(source, TensorData)
    rows, cols = source.shape
    values = memoryview(source.data).cast("B").cast("f")
    turned = memoryview(bytearray(source.nbytes)).cast("f")
    for row in range(rows):
        turned[row::rows] = values[row * cols : (row + 1) * cols]
    return replace(source, shape=(cols, rows), data=turned.cast("B"))
