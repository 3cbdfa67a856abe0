"""An adapter in another dialect: what a plan of `convert` says is done."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from loratool.adapter import Adapter, AdapterFiles, Source, TensorData
from loratool.api.common import Limits
from loratool.api.fitting import even_out
from loratool.dialects import DEFAULT, write_adapter_files
from loratool.dialects.base import Dialect
from loratool.dialects.registry import home_of, row_of
from loratool.dialects.rules import is_of_home
from loratool.errors import MismatchError
from loratool.frozen import Frozen, replace
from loratool.ops.convert import (
    ConvertPlan,
    fold_bytes,
    outline,
    plan_convert,
)
from loratool.ops.leaving import folds
from loratool.ops.locating import is_of_images, of_one_family
from loratool.ops.memory import MemoryPlan
from loratool.ops.renaming import in_dialect
from loratool.report.base import root_share


class Translated(Frozen):
    """An adapter as another dialect has it.

    Attributes:
        adapter: to be written.
        plan: what was done.
        relative_error: of what storing computed factors lost, a share of their ΔW.
    """

    adapter: Adapter
    plan: ConvertPlan
    relative_error: float = 0.0


def of_dialect(adapter: Adapter, dialect: str) -> Adapter:
    """A translated adapter, as if it had been read in its new dialect."""
    if adapter.dialect == dialect:
        return adapter
    return replace(adapter, dialect=dialect, config={}, key_order=())


def alike(adapters: Sequence[Adapter], limits: Limits) -> list[Adapter]:
    """Adapters whose modules go by the same names: those of the first one's dialect.

    Args:
        adapters: opened, of any dialects.
        limits: of memory and threads.

    Raises:
        MismatchError: of `loratool.ops.convert.plan_convert`.
    """
    row = home_of(adapters[0].dialect)
    if not any(home_of(one.dialect).table for one in adapters):
        # Read, their modules have the names of transformers in all of them.
        return [a if is_of_home(a, row.name) else of_dialect(a, row.name) for a in adapters]
    if not all(map(_is_renamed, adapters)) or _are_alike(adapters):
        return list(adapters)
    row, made = _in_one_naming(adapters, limits)
    return [
        new if row.name == home_of(old.dialect).name
        else replace(new, dialect=row.name, notes=(
            *new.notes, f"the modules of {new.label} are named as {row.title} names them",
        ))
        for old, new in zip(adapters, made, strict=True)
    ]  # fmt: skip


def _in_one_naming(adapters: Sequence[Adapter], limits: Limits) -> tuple[Dialect, list[Adapter]]:
    """The adapters in the first of their dialects that has names for all of them, and that one.

    Raises:
        MismatchError: of `plan_convert`, none has: what the first dialect says.
    """
    problems, told = [], of_one_family(adapters)
    rows = [home_of(one.dialect) for one in adapters]
    for name in dict.fromkeys(row.name for row in rows if row.table is not None):
        try:
            made = [carry_out(plan_convert(one, name), limits).adapter for one in told]
            return row_of(name), [replace(new, metadata=old.metadata)
                                  for old, new in zip(adapters, made, strict=True)]  # fmt: skip
        except MismatchError as problem:
            problems.append(problem)
    raise problems[0]


def _is_renamed(adapter: Adapter) -> bool:
    """True if a dialect of images has names for it; PEFT's folders may be of any model."""
    table = home_of(adapter.dialect).table
    return bool(table and table.naming) or (is_of_home(adapter, DEFAULT) and is_of_images(adapter))


def _are_alike(adapters: Sequence[Adapter]) -> bool:
    """True if no adapter needs other names: one dialect, and modules in common."""
    names = [{s.name for s in one.specs} for one in adapters]
    same = len({(one.dialect, one.is_flat) for one in adapters}) == 1
    return same and all(names[0] & other for other in names[1:])


def carry_out(plan: ConvertPlan, limits: Limits, *, is_dry: bool = False) -> Translated:
    """Compute what a plan says.

    Args:
        plan: of `plan_convert`.
        limits: of memory and threads.
        is_dry: put tensors without content in the place of computed ones.
    """
    memory = memory_for(plan, limits)
    if is_dry:
        return Translated(_named(outline(plan), plan, is_dry=True), plan)
    adapter, error = _with_factors(plan, 1 if memory is None else memory.threads)
    adapter = _named(adapter, plan)
    if not plan.is_evened:
        return Translated(adapter, plan, error)
    even = even_out(adapter, plan.row.name, limits)
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
    error = root_share(sum(f.error_square for f in folded), sum(f.square for f in folded))
    return replace(plan.adapter, specs=specs), error


def memory_for(plan: ConvertPlan, limits: Limits) -> MemoryPlan | None:
    """How many workers fit into memory, and what they take; None where nothing is computed."""
    needs = fold_bytes(plan)
    return limits.plan(needs, kept=sum(needs) // 2) if needs else None


def _named(adapter: Adapter, plan: ConvertPlan, *, is_dry: bool = False) -> Adapter:
    """The adapter under the names of a table, whose writer folds scalings that have no place."""
    if not plan.is_named:
        return adapter
    adapter = in_dialect(adapter, plan.row, blank if is_dry else _remade)
    if not (is_dry and folds(plan.row)):
        return adapter
    return replace(adapter, specs=tuple(replace(s, scaling=1.0) for s in adapter.specs))


def _remade(source: Source, factor: float, dtype: str) -> Source:
    from loratool.delta.scaling import remade

    return remade(source, factor, dtype)


def blank(source: Source, factor: float, dtype: str) -> Source:
    """A factor without content, as `loratool.delta.stacking.join` asks for one."""
    return TensorData(source.name, dtype, source.shape, b"")


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
    if row_of(dialect).table is not None or files.numbers is not None:
        return files
    said = {k: v for k, v in metadata.items() if k != "loratool"}
    return replace(files, metadata={**said, **files.metadata})
