"""Changes that depend on the base, made into plain LoRA of it: DoRA, OFT, PiSSA and their kin."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loratool.adapter import Adapter, DeltaSpec
from loratool.api.common import Limits
from loratool.api.detach import map_specs
from loratool.delta.forms import blank_pair
from loratool.dialects.base import Dialect
from loratool.dtypes import result_dtype
from loratool.ops.detach import plan_detach
from loratool.ops.inputs import OpenedBase
from loratool.ops.sizes import with_sizes
from loratool.ops.weights import Weight
from loratool.report.algebra import share_of
from loratool.store.checkpoint import Checkpoint

if TYPE_CHECKING:
    from loratool.engine.converting import Paired
    from loratool.engine.kernel import Env


@dataclass(frozen=True)
class Freed:
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
    return [s for s in adapter.specs if not s.is_fixed and s.is_matrix]


def unholdable(adapter: Adapter, row: Dialect) -> set[str]:
    """Names of such changes that a dialect has no place for."""
    return {s.name for s in dependent(adapter) if row.obstacle(s)}


def outline_free(
    adapter: Adapter, names: Collection[str], base: Checkpoint, rank: int | None
) -> Adapter:
    """The adapter with factors without content for these changes; arguments of `free_of_base`."""
    sized = with_sizes(adapter, base, "converted")
    specs = (blank_pair(s, rank) if s.name in names else s for s in sized.specs)
    return replace(adapter, specs=tuple(specs))


def free_of_base(
    adapter: Adapter, names: Collection[str], base: OpenedBase, rank: int | None, limits: Limits
) -> Freed:
    """Make LoRA of changes that depend on the base: the best of a rank.

    Args:
        adapter: opened.
        names: of the changes.
        base: what it was trained on.
        rank: at most; None = the rank that W' - W has.
        limits: workers and memory.

    Raises:
        MismatchError: LT-460, one that no LoRA is made of; or of binding.
    """
    specs = tuple(s for s in adapter.specs if s.name in names)
    plan = plan_detach([(replace(adapter, specs=specs, replacements=()), Weight())],
                       base.checkpoint)  # fmt: skip

    def work(spec: DeltaSpec, env: Env) -> Paired:
        from loratool.engine.detaching import as_lora

        places = plan.places[spec.name]
        return as_lora(plan.settled(spec), places, env, rank=rank, dtype=result_dtype(plan.dtype))

    found = map_specs(work, specs, plan, limits)
    made = {one.spec.name: one.spec for one in found}
    error = share_of(math.fsum(f.error_square for f in found), math.fsum(f.square for f in found))
    ranks = sorted({one.spec.rank for one in found})
    span = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    kinds = ", ".join(sorted({s.title for s in specs}))
    return Freed(
        replace(adapter, specs=tuple(made.get(s.name, s) for s in adapter.specs)), error,
        (f"{len(specs)} changes depend on the base ({kinds}): written as LoRA of rank {span}, "
         f"which differs by {error:.2g} of W' - W",),
    )  # fmt: skip
