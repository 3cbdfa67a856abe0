"""Biases that change with the weight beside them (IA³, RoAd): with the base, whole tensors."""

from __future__ import annotations

from collections.abc import Sequence

from loratool.adapter import Adapter, DeltaSpec, Replacement, TensorData
from loratool.delta.forms import as_bias
from loratool.frozen import replace
from loratool.ops.in_base import find_in_base
from loratool.plan import Place
from loratool.store.checkpoint import Checkpoint


def companions(adapter: Adapter) -> list[DeltaSpec]:
    """The changes of biases that depend on the base's numbers."""
    return [s for s in adapter.specs if s.row.is_companion and not s.is_fixed]


def places_of(adapter: Adapter, specs: Sequence[DeltaSpec], base: Checkpoint) -> dict[str, Place]:
    """Name of a bias -> where it lies, of those that the base has.

    Raises:
        MismatchError: of binding.
    """
    if not specs:
        return {}
    found = find_in_base(replace(adapter, specs=tuple(specs), replacements=()), base).places
    return {name: places[0] for name, places in found.items()}


def changed(places: dict[str, Place], *, is_dry: bool = False) -> list[Replacement]:
    """The biases as they are after the change, in the base's type.

    Args:
        places: of `places_of`.
        is_dry: tensors without content.
    """
    if is_dry or not places:
        blanks = ((n, p.source) for n, p in places.items())
        return [as_bias(n, TensorData(n, s.dtype, s.shape, b"")) for n, s in blanks]
    from loratool.engine.detaching import changed_vector
    from loratool.engine.kernel import Env
    from loratool.store.reader import FileReader

    with FileReader() as reader:
        env = Env(reader)
        made = [as_bias(name, changed_vector([place], env)) for name, place in places.items()]
        reader.check_unchanged()
    return made


def with_whole_biases(adapter: Adapter, base: Checkpoint) -> Adapter:
    """The adapter with such biases as tensors that replace the base's; one that it lacks goes.

    Raises:
        MismatchError: of binding.
    """
    specs = companions(adapter)
    if not specs:
        return adapter
    names = {s.name for s in specs}
    made = changed(places_of(adapter, specs, base))
    return replace(adapter, specs=tuple(s for s in adapter.specs if s.name not in names),
                   replacements=(*adapter.replacements, *made))  # fmt: skip
