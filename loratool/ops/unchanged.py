"""Which tensors of a fine-tune are the base's own, as far as their bytes tell (no torch)."""

from __future__ import annotations

from loratool.adapter import Adapter
from loratool.frozen import replace
from loratool.ops.extract import ExtractPlan
from loratool.store.reader import FileReader, have_same_bytes


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
            if not names or pair.parts or pair.base is None:
                continue
            if have_same_bytes([pair.base, pair.tuned], reader):
                equal |= names
    return replace(made, specs=tuple(s for s in made.specs if s.name not in equal))
