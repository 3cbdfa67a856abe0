"""Small tensors that were trained whole (biases, norms, bare parameters) as changes of the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loratool.adapter import DeltaSpec, Replacement, TensorRef
from loratool.delta.forms import new_difference
from loratool.engine.factors import make_data
from loratool.engine.kernel import Env
from loratool.store.reader import FileReader


def differences(
    replacements: Sequence[Replacement], base: Mapping[str, TensorRef]
) -> tuple[list[DeltaSpec], list[Replacement]]:
    """Changes of the tensors that the base has in the same shape, and all others as they are.

    Args:
        replacements: whole tensors.
        base: name -> what it replaces.

    Returns:
        Changes in float32, those of nothing left out; replacements that cannot be changes.
    """
    made, rest = [], []
    with FileReader() as reader:
        env = Env(reader)
        for one in replacements:
            old = base.get(one.name)
            if (
                old is None
                or one.rows is not None
                or old.shape != one.source.shape
                or _is_of_module(one)
            ):
                rest.append(one)
                continue
            change = env.load(one.source).double() - env.load(old).double()
            if bool(change.any()):
                made.append(new_difference(one.name, make_data(f"{one.name} -", change, "F32")))
        reader.check_unchanged()
    return made, rest


def _is_of_module(one: Replacement) -> bool:
    """True for the weight of a linear layer, an embedding and the like."""
    return len(one.source.shape) != 1 and one.name.endswith(".weight")
