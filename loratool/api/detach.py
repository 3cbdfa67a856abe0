"""Adapters whose change depends on the base, as sums that do not: with the base at hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from loratool.adapter import Adapter, DeltaSpec
from loratool.api.common import Limits
from loratool.errors import NumericError
from loratool.frozen import Frozen, replace
from loratool.ops.detach import DetachPlan, Weighed
from loratool.ops.inputs import OpenedBase

if TYPE_CHECKING:
    import torch

    from loratool.engine.kernel import Env

T = TypeVar("T")

_SMALLEST = 2.0**-10  # of W that may be left of a row: what is added to it grows by the inverse


class Detached(Frozen):
    """Adapters that can be added, scaled and cut on their own.

    Attributes:
        plan: what was found in the base.
        base: opened.
        adapters: with their coefficients; every spec is additive.
        gains: module -> what the rows of the base are multiplied with in the sum.
    """

    plan: DetachPlan
    base: OpenedBase
    adapters: tuple[Weighed, ...]
    gains: Mapping[str, torch.Tensor]

    def attach(self, adapter: Adapter, limits: Limits) -> Adapter:
        """The result as an adapter for this base: DoRA where rows of the base are scaled."""
        if not self.plan.turned:
            return adapter

        def turn(spec: DeltaSpec, env: Env) -> DeltaSpec:
            from loratool.engine.detaching import with_magnitude

            if not spec.is_matrix:  # biases and norms have no rows
                return spec
            return with_magnitude(spec, self.gains.get(spec.name), self.plan.places[spec.name], env)

        return replace(adapter, specs=tuple(map_specs(turn, adapter.specs, self.plan, limits)))


def detach(plan: DetachPlan, base: OpenedBase, limits: Limits) -> Detached:
    """Take apart what depends on the base.

    Args:
        plan: what depends on it.
        base: what the adapters were trained on.
        limits: workers and memory.

    Raises:
        NumericError: LT-806, a row of the base that DoRA cannot scale.
    """
    own = [_gains_of(adapter, plan, limits) for adapter, _ in plan.adapters]
    gains = _sum_gains(plan, own)
    made: list[Weighed] = []
    for (adapter, weight), mine in zip(plan.adapters, own, strict=True):
        rows = {name: _shares(mine.get(name), total) for name, total in gains.items()}
        specs = map_specs(partial(_take_apart, plan, rows), adapter.specs, plan, limits)
        made.append((replace(adapter, specs=tuple(specs)), weight))
    return Detached(plan, base, tuple(made), gains)


def _shares(mine: torch.Tensor | None, total: torch.Tensor) -> torch.Tensor:
    """What the rows of a product are multiplied with where the sum scales the whole."""
    if mine is total:  # alone, as it is: also where nothing is left of a row
        return total.new_ones(len(total))
    return (1.0 if mine is None else mine) / total


def _take_apart(
    plan: DetachPlan, rows: Mapping[str, torch.Tensor], spec: DeltaSpec, env: Env
) -> DeltaSpec:
    from loratool.engine.detaching import with_change, with_rows_scaled, with_start

    if spec.reach == "all":
        spec = with_start(spec, plan.places[spec.name], env)
    elif not spec.is_apart:
        spec = with_change(spec, plan.places[spec.name], env)
    return with_rows_scaled(spec, rows[spec.name], env) if spec.name in rows else spec


def _gains_of(adapter: Adapter, plan: DetachPlan, limits: Limits) -> dict[str, torch.Tensor]:
    """What an adapter multiplies rows of the base with, by module."""

    def gains(spec: DeltaSpec, env: Env) -> torch.Tensor:
        from loratool.engine.detaching import row_gains

        return row_gains(spec, plan.places[spec.name], env)

    specs = [s for s in adapter.specs if s.scales_rows]
    found = map_specs(gains, specs, plan, limits)
    return {spec.name: one for spec, one in zip(specs, found, strict=True)}


def _sum_gains(
    plan: DetachPlan, own: Sequence[Mapping[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """1 + Σ weight·(c - 1) of every module whose rows are scaled; c itself for one c at weight 1.

    Raises:
        NumericError: LT-806, hardly anything of a row is left.
    """
    total: dict[str, torch.Tensor] = {}
    holders = Counter(s.name for adapter, _ in plan.adapters for s in adapter.specs)
    for (_, weight), mine in zip(plan.adapters, own, strict=True):
        for name, found in mine.items():
            factor = weight.of(name)
            change = found if factor == 1 else 1 + factor * (found - 1)
            total[name] = total[name] + (change - 1) if name in total else change
    for name, rows in total.items():
        least, is_alone = float(rows.abs().min()), holders[name] == 1
        if least < _SMALLEST and not (is_alone and any(o.get(name) is rows for o in own)):
            weight = next(w for (_, w), o in zip(plan.adapters, own, strict=True) if name in o)
            what = f"the change at weight {weight.of(name):g}" if is_alone else "the sum"
            raise NumericError(
                "LT-806", f"{what} takes a row of the base away, and DoRA only scales rows",
                key=name, got=f"row {int(rows.abs().argmin())} times {least:.1e}",
                hint="other weights; or into the base, which can hold that: "
                f"loratool merge {'ADAPTER:W' if is_alone else 'A:W B:W'} --base BASE -o OUT",
            )  # fmt: skip
    return total


def map_specs(
    work: Callable[[DeltaSpec, Env], T],
    specs: Sequence[DeltaSpec],
    plan: DetachPlan,
    limits: Limits,
) -> list[T]:
    """``work(spec, env)`` of every spec, module by module in workers."""
    if not specs:
        return []
    from loratool.engine.kernel import Env
    from loratool.engine.workers import map_in_workers
    from loratool.store.reader import FileReader

    threads = limits.plan(plan.needs()).threads
    with FileReader() as reader:
        env = Env(reader)
        found = map_in_workers(lambda spec: work(spec, env), specs, threads)
        reader.check_unchanged()
    return found
