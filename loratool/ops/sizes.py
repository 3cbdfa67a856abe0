"""Changes whose tensors do not say the size of the weight, settled on a base."""

from __future__ import annotations

from loratool.adapter import Adapter
from loratool.frozen import replace
from loratool.ops.additive import EXTRACT, require_additive
from loratool.ops.in_base import find_in_base
from loratool.store.checkpoint import Checkpoint


def with_sizes(
    adapter: Adapter, base: Checkpoint | None, verb: str, *, hint: str = EXTRACT
) -> Adapter:
    """The adapter with every change in the size of its weight; itself where all are.

    Args:
        adapter: opened.
        base: what it was trained on, None if nobody gave it.
        verb: past participle for the message.
        hint: the way out.

    Raises:
        MismatchError: LT-460, there is no base to ask; LT-430 … LT-480 of binding.
    """
    if not any(s.is_open for s in adapter.specs):
        return adapter
    if base is None:
        open_ones = tuple(s for s in adapter.specs if s.is_open)
        require_additive(replace(adapter, specs=open_ones), verb, hint=hint)
        return adapter
    places = find_in_base(adapter, base).places
    return replace(
        adapter,
        specs=tuple(
            replace(s, settings=places[s.name][0].part.spec.settings) if s.is_open else s
            for s in adapter.specs
        ),
    )
