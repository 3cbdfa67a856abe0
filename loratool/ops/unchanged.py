"""Which tensors of a fine-tune are the base's own, as far as their bytes tell (no torch)."""

from __future__ import annotations

from loratool.adapter import Adapter, TensorRef
from loratool.frozen import replace
from loratool.ops.extract import ExtractPlan
from loratool.store.reader import FileReader

_PIECE = 1 << 22


def without_equal(made: Adapter, extract: ExtractPlan) -> Adapter:
    """An outline less the changes of tensors that are the same, byte for byte, in both checkpoints.

    Of a tensor that changed little more than its beginning is read.

    Args:
        made: of `outline`.
        extract: the plan that it outlines.
    """
    wanted = {spec.name for spec in made.specs}
    equal: set[str] = set()
    with FileReader() as reader:
        for pair in extract.pairs:
            names = wanted.intersection(extract.names_of(pair))
            if names and not pair.parts and _is_equal(pair.base, pair.tuned, reader):
                equal |= names
    return replace(made, specs=tuple(s for s in made.specs if s.name not in equal))


def _is_equal(one: TensorRef | None, other: TensorRef, reader: FileReader) -> bool:
    if one is None or (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    held = memoryview(bytearray(2 * min(_PIECE, one.nbytes)))
    for start in range(0, one.nbytes, _PIECE):
        size = min(_PIECE, one.nbytes - start)
        mine, theirs = held[:size], held[size : 2 * size]
        reader.read_into(one, start, mine)
        reader.read_into(other, start, theirs)
        if mine != theirs:
            return False
    return True
