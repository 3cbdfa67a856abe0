"""An adapter in another dialect: what `convert` does, and every command with ``to``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from loratool.adapter import Adapter, AdapterFiles
from loratool.api.common import Limits
from loratool.api.fitting import even_out
from loratool.dialects import write_adapter_files
from loratool.dialects.registry import row_of
from loratool.ops.convert import ConvertPlan, fold_bytes, outline, plan_convert
from loratool.report.algebra import share_of


@dataclass(frozen=True)
class Translated:
    """An adapter as another dialect has it.

    Attributes:
        adapter: to be written.
        plan: what was done.
        relative_error: of what storing computed factors lost, a share of their ΔW.
    """

    adapter: Adapter
    plan: ConvertPlan
    relative_error: float = 0.0


def translate(adapter: Adapter, dialect: str, limits: Limits) -> Translated:
    """Bring an adapter that a command made into a dialect.

    Raises:
        MismatchError: of `loratool.ops.convert.plan_convert`.
        DiskError: LT-605.
    """
    return carry_out(plan_convert(adapter, dialect), limits)


def carry_out(plan: ConvertPlan, limits: Limits, *, is_dry: bool = False) -> Translated:
    """Compute what a plan says.

    Args:
        plan: of `plan_convert`.
        limits: of memory and threads.
        is_dry: put tensors without content in the place of computed ones.
    """
    threads = _threads(plan, limits)
    if is_dry:
        return Translated(outline(plan), plan)
    adapter, error = _with_factors(plan, threads)
    if not plan.is_evened:
        return Translated(adapter, plan, error)
    even = even_out(adapter, limits)
    return Translated(even.adapter, plan, math.hypot(error, even.relative_error))


def _with_factors(plan: ConvertPlan, threads: int) -> tuple[Adapter, float]:
    """The adapter with the factors that must be computed, and the error of storing them."""
    if not plan.computed:
        return plan.adapter, 0.0
    from loratool.engine.converting import make_factors

    names = plan.computed
    chosen = [s for s in plan.adapter.specs if s.name in names]
    folded = make_factors(chosen, names, threads)
    made = {f.spec.name: f.spec for f in folded}
    specs = tuple(made.get(s.name, s) for s in plan.adapter.specs)
    error = share_of(sum(f.error_square for f in folded), sum(f.square for f in folded))
    return replace(plan.adapter, specs=specs), error


def _threads(plan: ConvertPlan, limits: Limits) -> int:
    """How many workers fit into memory; 1 where nothing is computed."""
    needs = fold_bytes(plan)
    return limits.plan(needs, kept=sum(needs) // 2).threads if needs else 1


def files_of(
    adapter: Adapter, dialect: str, metadata: Mapping[str, str], **how: Any
) -> AdapterFiles:
    """The files of a translated adapter; a configuration's tensor file keeps what was said.

    Args:
        adapter: of `carry_out`.
        dialect: that it was brought into.
        metadata: of the file that it was read from.
        how: of `loratool.dialects.write_adapter_files`.
    """
    files = write_adapter_files(adapter, dialect, **how)
    if row_of(dialect).table is not None:
        return files
    said = {k: v for k, v in metadata.items() if k != "loratool"}
    return replace(files, metadata={**said, **files.metadata})
