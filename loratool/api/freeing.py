"""Changes that depend on the base, made into plain LoRA of it: DoRA, OFT, PiSSA and their kin."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from loratool.adapter import Adapter, DeltaSpec, Replacement, TensorRef
from loratool.api.beside import changed, places_of
from loratool.api.common import Limits
from loratool.api.detach import map_specs
from loratool.delta.forms import blank_pair, new_difference, with_kernel
from loratool.dialects.base import Dialect
from loratool.dialects.stated import as_lora
from loratool.dtypes import result_dtype
from loratool.frozen import Frozen, replace
from loratool.ops.detach import DetachPlan, plan_detach
from loratool.ops.inputs import OpenedBase
from loratool.ops.sizes import with_sizes
from loratool.ops.weights import Weight
from loratool.plan import Place
from loratool.report.base import root_share
from loratool.report.text import plural
from loratool.store.checkpoint import Checkpoint

if TYPE_CHECKING:
    from loratool.engine.converting import Paired
    from loratool.engine.kernel import Env


class Freed(Frozen):
    """An adapter, some changes of which no longer depend on the base.

    Attributes:
        adapter: with plain LoRA in their place.
        relative_error: of them, as stored: what the rank and the type lost.
        notes: one sentence each.
    """

    adapter: Adapter
    relative_error: float
    notes: tuple[str, ...]


def dependent(adapter: Adapter) -> list[DeltaSpec]:
    """The changes whose W' - W depends on the numbers in W."""
    return [s for s in adapter.specs if not s.is_fixed]


def unholdable(adapter: Adapter, row: Dialect) -> set[str]:
    """Names of such changes that a dialect has no place for."""
    return {s.name for s in dependent(adapter) if row.obstacle(s)}


def outline_free(
    adapter: Adapter, names: Collection[str], base: Checkpoint, rank: int | None, row: Dialect
) -> Adapter:
    """The adapter with tensors without content for these changes; arguments of `free_of_base`.

    Raises:
        MismatchError: of `free_of_base`.
    """
    sized = with_sizes(adapter, base, "converted")
    plan, beside = _find(sized, names, base)
    weights = {
        s.name: with_kernel(blank_pair(s, rank), plan.places[s.name][0].source.shape)
        for s in sized.specs if s.name in plan.places
    }  # fmt: skip
    blanks = changed(beside, is_dry=True)
    if row.holds_whole:
        return _exchanged(sized, names, weights, blanks, ())
    changes = [new_difference(one.name, one.source) for one in blanks]
    return _exchanged(sized, names, weights, (), changes)


def free_of_base(
    adapter: Adapter, names: Collection[str], base: OpenedBase, rank: int | None, row: Dialect,
    limits: Limits,
) -> Freed:  # fmt: skip
    """Make LoRA of changes that depend on the base: the best of a rank.

    Args:
        adapter: opened.
        names: of the changes.
        base: what it was trained on.
        rank: at most; None = the rank that W' - W has.
        row: the dialect to write: a bias that changes with its weight becomes a tensor that
            replaces the base's, or, where it holds none, a change of its own.
        limits: workers and memory.

    Raises:
        MismatchError: LT-460, one that no LoRA is made of; or of binding.
    """
    plan, beside = _find(adapter, names, base.checkpoint)

    def work(spec: DeltaSpec, env: Env) -> Paired:
        from loratool.engine.detaching import as_lora

        places = plan.places[spec.name]
        return as_lora(spec, places, env, rank=rank, dtype=result_dtype(plan.dtype))

    specs = [s for one, _ in plan.adapters for s in one.specs if s.name in plan.places]
    found = map_specs(work, specs, plan, limits)
    made = {one.spec.name: one.spec for one in found}
    error = root_share(math.fsum(f.error_square for f in found), math.fsum(f.square for f in found))
    done = _exchanged(adapter, names, made, *_biases(beside, row))
    return Freed(done, error, _notes(specs, list(made.values()), len(beside), error))


def _find(
    adapter: Adapter, names: Collection[str], base: Checkpoint
) -> tuple[DetachPlan, dict[str, Place]]:
    """Where the weights lie in the base, and those biases beside them that it has."""
    mine = [s for s in adapter.specs if s.name in names]
    weights = tuple(s for s in mine if not s.row.is_companion)
    plan = plan_detach([(replace(adapter, specs=weights, replacements=()), Weight())], base)
    return plan, places_of(adapter, [s for s in mine if s.row.is_companion], base)


def _biases(beside: dict[str, Place], row: Dialect) -> tuple[list[Replacement], list[DeltaSpec]]:
    """Biases as they are with the change, or by how much they change."""
    made = changed(beside)
    if row.holds_whole or not made:
        return made, []
    from loratool.engine.differences import differences

    old = {name: place.source for name, place in beside.items()}
    return [], differences(made, {n: s for n, s in old.items() if isinstance(s, TensorRef)})[0]


def _exchanged(
    adapter: Adapter, names: Collection[str], weights: Mapping[str, DeltaSpec],
    biases: Sequence[Replacement], changes: Sequence[DeltaSpec],
) -> Adapter:  # fmt: skip
    """The adapter with other changes of these names; a bias that the base lacks has none."""
    kept = (weights.get(s.name, s) for s in adapter.specs
            if s.name in weights or s.name not in names)  # fmt: skip
    found = replace(adapter, specs=(*kept, *changes),
                    replacements=(*adapter.replacements, *biases))  # fmt: skip
    return found if dependent(found) else as_lora(found)


def _notes(
    specs: Sequence[DeltaSpec], made: Sequence[DeltaSpec], biases: int, error: float
) -> tuple[str, ...]:
    ranks = sorted({one.rank for one in made})
    span = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    kinds = ", ".join(sorted({s.title for s in specs}))
    notes = [
        f"{plural(len(specs), 'change depends', 'changes depend')} on the base ({kinds}): "
        f"written as LoRA of rank {span}, which differs by {error:.2g} of W' - W"
    ]
    if biases:
        words = plural(biases, "bias changes", "biases change")
        notes.append(f"{words} with them: written as they are after the change")
    return tuple(notes)
