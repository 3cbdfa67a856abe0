"""An adapter beside its base, as numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from loratool.frozen import Frozen


class ModuleLook(Frozen):
    """One delta, or several of them summed up.

    Attributes:
        name: parameter.
        family: last part of the module path.
        dtype: of the base's tensor; ``mixed`` where they differ.
        rank: of the factors.
        delta_norm: ‖ΔW‖_F.
        rho: ‖ΔW‖_F / ‖W‖_F over the elements that the delta covers.
        amplification: ‖ΔW‖_F / ‖Uᵀ W V‖_F, U and V the singular vectors of ΔW; None where the
            change is no product of two factors, or W has nothing in these directions.
        noise_rank: singular values that stand out of the rounding noise of a merge into the base's
            type, which is simulated; the largest of all tensors that one delta goes to.
        swallowed: format -> √(Σ(rounding error)² / ΣΔW²) of a merge into it; infinite if it
            overflows.
        changed: format -> share of elements that would change.
        noise_top: largest singular value of that noise, of a single module's loudest tensor.
    """

    name: str
    family: str
    dtype: str
    rank: float
    delta_norm: float
    rho: float
    amplification: float | None
    noise_rank: float | None
    swallowed: Mapping[str, float]
    changed: Mapping[str, float]
    noise_top: float | None = None

    @property
    def loss(self) -> float:
        """Share swallowed by the base's own type."""
        return self.swallowed.get(self.dtype, 0.0)


class AdapterLook(Frozen):
    """All deltas of an adapter beside a base.

    Attributes:
        base: its label.
        modules: in the adapter's order.
        families: summed up, in order of first appearance.
        total: all of them.
    """

    base: str
    modules: tuple[ModuleLook, ...]
    families: tuple[ModuleLook, ...]
    total: ModuleLook

    @property
    def worst(self) -> ModuleLook | None:
        """The module of which a merge would swallow most."""
        return max(self.modules, key=lambda m: m.loss, default=None)


class Sums(Frozen):
    """What figures are made of; see `loratool.engine.looking.Look`."""

    family: str
    dtype: str
    rank: int
    numel: int
    weight_square: float
    delta_square: float
    core_square: float | None
    noise_rank: int | None
    errors: Mapping[str, float]
    changed: Mapping[str, float]


def combine(name: str, family: str, rows: Sequence[Sums]) -> ModuleLook:
    """Sums over tensors; of ranks the median over modules."""
    delta = math.fsum(r.delta_square for r in rows)
    weight = math.fsum(r.weight_square for r in rows)
    numel = max(1, sum(r.numel for r in rows))
    products = [r for r in rows if r.core_square is not None]
    core = math.fsum(r.core_square or 0.0 for r in products)
    inside = math.fsum(r.delta_square for r in products)
    kinds = {r.dtype for r in rows}
    noise = [r.noise_rank for r in rows if r.noise_rank is not None]
    words = [w for w in (rows[0].errors if rows else ()) if all(w in r.errors for r in rows)]
    return ModuleLook(
        name, family, kinds.pop() if len(kinds) == 1 else "mixed",
        statistics.median(r.rank for r in rows) if rows else 0,
        math.sqrt(delta),
        math.sqrt(delta / weight) if weight else 0.0,
        math.sqrt(inside / core) if core > 0 else None,
        statistics.median(noise) if noise else None,
        {w: math.sqrt(math.fsum(r.errors[w] for r in rows) / delta) if delta else 0.0
         for w in words},
        {w: math.fsum(r.changed[w] for r in rows) / numel for w in words},
    )  # fmt: skip
