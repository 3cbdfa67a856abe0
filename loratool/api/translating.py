"""An adapter in another dialect: what `convert` does, and every command with ``to``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from loratool.adapter import Adapter, AdapterFiles, Source, TensorData
from loratool.api.common import Limits
from loratool.api.fitting import even_out
from loratool.dialects import write_adapter_files
from loratool.dialects.programs import Look, Program
from loratool.dialects.registry import home_of, row_of
from loratool.dialects.rules import is_of_home
from loratool.errors import MismatchError, list_some
from loratool.frozen import Frozen, replace
from loratool.ops.convert import (
    ConvertPlan,
    compute_also,
    fold_bytes,
    folds,
    outline,
    plan_convert,
)
from loratool.ops.fitting import freeing, leaving_out
from loratool.ops.memory import MemoryPlan
from loratool.ops.renaming import in_dialect
from loratool.report.algebra import share_of
from loratool.report.check import LOADS, Simulation


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


def translate(
    adapter: Adapter, dialect: str, limits: Limits, program: Program | None = None, **how: Any
) -> Translated:
    """Bring an adapter that a command made into a dialect, as a program loads it.

    Args:
        adapter: as made.
        dialect: to write it in.
        limits: of memory and threads.
        program: None = any.
        how: of `loratool.dialects.write_adapter_files`.

    Raises:
        MismatchError: of `loratool.ops.convert.plan_convert`, and of `settled`.
        DiskError: LT-605.
    """
    return carry_out(plan_translation(adapter, dialect, limits, program, **how), limits)


def plan_translation(
    adapter: Adapter, dialect: str, limits: Limits, program: Program | None = None, **how: Any
) -> ConvertPlan:
    """The plan of `translate`, which raises what that would."""
    plan = plan_convert(adapter, dialect)
    return plan if program is None else settled(plan, program, limits, **how)


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
    first = adapters[0]
    row = home_of(first.dialect)
    if not any(home_of(one.dialect).table for one in adapters):
        # Read, their modules have the names of transformers in all of them.
        return [a if is_of_home(a, row.name) else of_dialect(a, row.name) for a in adapters]
    are_tables = all(home_of(one.dialect).table is not None for one in adapters)
    if row.table is None or not row.table.naming or not are_tables or _are_alike(adapters):
        return list(adapters)
    made = [translate(one, row.name, limits).adapter for one in adapters]
    return [
        replace(new, dialect=row.name, notes=(
            *new.notes, f"the modules of {new.label} are named as {row.title} names them",
        ))
        for new in made
    ]  # fmt: skip


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
    error = share_of(sum(f.error_square for f in folded), sum(f.square for f in folded))
    return replace(plan.adapter, specs=specs), error


def memory_for(plan: ConvertPlan, limits: Limits) -> MemoryPlan | None:
    """How many workers fit into memory, and what they take; None where nothing is computed."""
    needs = fold_bytes(plan)
    return limits.plan(needs, kept=sum(needs) // 2) if needs else None


def _named(adapter: Adapter, plan: ConvertPlan, *, is_dry: bool = False) -> Adapter:
    """The adapter under the names of a table, whose writer folds scalings that have no place."""
    if not plan.is_named:
        return adapter
    adapter = in_dialect(adapter, plan.row, _blank if is_dry else _remade)
    if not (is_dry and folds(plan.row)):
        return adapter
    return replace(adapter, specs=tuple(replace(s, scaling=1.0) for s in adapter.specs))


def _remade(source: Source, factor: float, dtype: str) -> Source:
    from loratool.delta.scaling import remade

    return remade(source, factor, dtype)


def _blank(source: Source, factor: float, dtype: str) -> Source:
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


# ---------------------------------------------------------------------------------- for a program


def settled(plan: ConvertPlan, program: Program, limits: Limits, **how: Any) -> ConvertPlan:
    """The plan, with plain factors for what a program does not load as it is.

    Args:
        plan: into the dialect that the program loads best.
        program: whose loader is simulated.
        limits: of memory and threads.
        how: of `loratool.dialects.write_adapter_files`.

    Raises:
        MismatchError: LT-488, it loads no such adapter.
    """
    again = compute_also(plan, unloadable(plan, program, limits, how))
    plan = again if again.computed.keys() != plan.computed.keys() else plan
    found = _outcome(plan, program, limits, how)
    if found.verdict in ("no", "wrong"):
        raise MismatchError(
            "LT-488", f"{program.title} cannot load such an adapter", file=plan.source.path,
            got=list_some(found.reasons), key=list_some(found.deciding[0].names, 3) or None,
            hint=freeing(program, plan.source)
            or leaving_out(program, plan.source, found.deciding[0].names),
        )  # fmt: skip
    return plan


def unloadable(
    plan: ConvertPlan, program: Program, limits: Limits, how: Mapping[str, Any]
) -> list[str]:
    """Names of the changes that a program would not load, or not load right; as `settled`."""
    found = _outcome(plan, program, limits, how)
    bad = {k for m in found.modules if m.verdict != LOADS for k in m.keys}
    bad |= {name for f in found.findings for name in f.names}
    return [name for name, keys in _keys(plan, limits, how).items() if keys & bad]


def _outcome(
    plan: ConvertPlan, program: Program, limits: Limits, how: Mapping[str, Any]
) -> Simulation:
    """What the program would make of the result."""
    made, dialect = carry_out(plan, limits, is_dry=True), plan.row.name
    files = files_of(made.adapter, dialect, plan.source.metadata, **how)
    return program.simulate(Look.of_files(files, dialect))


def _keys(plan: ConvertPlan, limits: Limits, how: Mapping[str, Any]) -> dict[str, set[str]]:
    """Name of a change, as the plan has it -> the keys that its tensors get."""
    made = carry_out(plan, limits, is_dry=True)
    files = files_of(made.adapter, plan.row.name, plan.source.metadata, **how)
    by_source = {id(source): key for key, source in files.tensors}
    owner = {id(f): s.name for s in plan.adapter.specs for f in s.fields.values()}
    found: dict[str, set[str]] = {}
    for spec in made.adapter.specs:
        keys = {by_source[id(f)] for f in spec.fields.values() if id(f) in by_source}
        name = next((owner[id(f)] for f in spec.fields.values() if id(f) in owner), spec.name)
        found.setdefault(name, set()).update(keys)
    return found
