"""``ensure_weight_tying``: PEFT holds one pair of factors for embedding and head."""

from __future__ import annotations

from loratool.adapter import Adapter, DeltaSpec, Source, TensorData
from loratool.delta.forms import turned_round
from loratool.dialects.rules import tied_pairs
from loratool.engine.buffers import to_bytes
from loratool.engine.kernel import Env
from loratool.frozen import replace
from loratool.store.reader import FileReader


def tie_factors(adapter: Adapter) -> Adapter:
    """The adapter with the embedding's new factors, turned round, in the place of the head's."""
    pairs = tied_pairs(adapter)
    changed = {
        head.name: embedding
        for embedding, head in pairs
        if any(isinstance(f, TensorData) for s in (embedding, head) for f in s.fields.values())
    }
    if not changed:
        return adapter
    specs = tuple(_turned(s, changed[s.name]) if s.name in changed else s for s in adapter.specs)
    return replace(adapter, specs=specs)


def _turned(head: DeltaSpec, embedding: DeltaSpec) -> DeltaSpec:
    with FileReader() as reader:
        env = Env(reader)

        def turn(source: Source) -> TensorData:
            tensor = env.load(source).T.contiguous()
            return TensorData(head.name, source.dtype, tuple(tensor.shape), bytes(to_bytes(tensor)))

        turned = turned_round(embedding, head, turn)
    return replace(turned, rank=embedding.rank, alpha=embedding.alpha, scaling=embedding.scaling)
