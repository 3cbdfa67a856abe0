"""An adapter in a dialect as a program loads it: every command with ``--to`` and ``--for``."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from loratool.adapter import Adapter, AdapterFiles, DeltaSpec
from loratool.api.common import Limits
from loratool.api.translating import Translated, blank, carry_out, files_of
from loratool.dialects.programs import Look, Program
from loratool.dialects.registry import row_of
from loratool.errors import MismatchError, list_some
from loratool.frozen import Frozen, replace
from loratool.ops.convert import ConvertPlan, compute_also, outline, plan_convert
from loratool.ops.fitting import freeing, leaving_out
from loratool.ops.leaving import changes_of, less, skips, unheld
from loratool.ops.locating import locate
from loratool.ops.renaming import renamed
from loratool.report.check import LOADS, Simulation

BAD = ("no", "wrong")
"""Verdicts of what is not written for a program."""


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
    if program is None:
        return plan_convert(adapter, dialect)
    return planned_for(program, adapter, dialect, limits, how)


def planned_for(
    program: Program, adapter: Adapter, dialect: str, limits: Limits, how: Mapping[str, Any],
    **of_plan: Any,
) -> ConvertPlan:  # fmt: skip
    """`settled` of the plan of an adapter.

    Args:
        program: that shall load it.
        adapter: as it is.
        dialect: to write it in.
        limits: of memory and threads.
        how: of `loratool.dialects.write_adapter_files`.
        of_plan: of `loratool.ops.convert.plan_convert`.

    Raises:
        MismatchError: LT-488, it loads no such adapter; others of `plan_convert`.
    """
    try:
        plan = plan_convert(adapter, dialect, **of_plan)
    except MismatchError as problem:
        if problem.code != "LT-494":
            raise
        raise MismatchError(
            "LT-488", f"{program.title} cannot load such an adapter", file=adapter.path,
            key=problem.key, got=problem.got,
            hint=freeing(program, adapter) or _skipping(program, adapter, dialect, limits, how),
        ) from None  # fmt: skip
    try:
        return settled(plan, program, limits, **how)
    except MismatchError:
        if not adapter.key_order:
            raise
        again = replace(adapter, key_order=())  # the same under the spellings of new files
        return planned_for(program, again, dialect, limits, how, **of_plan)


class _Drawn(Frozen):
    """What a plan would write, with tensors without content."""

    plan: ConvertPlan
    specs: tuple[DeltaSpec, ...]
    files: AdapterFiles

    @classmethod
    def of(cls, plan: ConvertPlan, limits: Limits, how: Mapping[str, Any]) -> _Drawn:
        """Args as of `settled`."""
        made = carry_out(plan, limits, is_dry=True).adapter
        files = files_of(made, plan.row.name, plan.source.metadata, **how)
        return cls(plan, made.specs, files)

    def outcome(self, program: Program) -> Simulation:
        """What the program makes of it."""
        return program.simulate(Look.of_files(self.files, self.plan.row.name))

    def behind(self, keys: Collection[str]) -> list[str]:
        """Names of the changes, as the plan has them, whose tensors get any of these keys."""
        if not keys:
            return []
        by_source = {id(source): key for key, source in self.files.tensors}
        found: dict[str, None] = {}
        for spec, names in zip(self.specs, self._origins(), strict=True):
            if not {by_source.get(id(f)) for f in spec.fields.values()}.isdisjoint(keys):
                found |= dict.fromkeys(names)
        return list(found)

    def _origins(self) -> Iterable[tuple[str, ...]]:
        """Of each change that is written, names of those in the plan that it is made of."""
        plan, table = self.plan, self.plan.row.table
        if not plan.is_named or table is None:
            return [(spec.name,) for spec in self.specs]
        return [m.made_of for m in renamed(locate(outline(plan), table.naming), table, blank)]


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
    drawn = _plain(plan, program, limits, how)
    found = drawn.outcome(program)
    if found.verdict in BAD:
        names = found.deciding[0].names
        raise MismatchError(
            "LT-488", f"{program.title} cannot load such an adapter", file=plan.source.path,
            got=list_some(found.reasons), key=list_some(names, 3) or None,
            hint=freeing(program, plan.source) or leaving_out(program, plan.source, names)
            or _skipping(program, plan.source, plan.row.name, limits, how),
        )  # fmt: skip
    return drawn.plan


def _plain(plan: ConvertPlan, program: Program, limits: Limits, how: Mapping[str, Any]) -> _Drawn:
    drawn = _Drawn.of(plan, limits, how)
    again = compute_also(plan, _unloaded(drawn, program))
    is_same = again.computed.keys() == plan.computed.keys()
    return drawn if is_same else _Drawn.of(again, limits, how)


def _unloaded(drawn: _Drawn, program: Program) -> list[str]:
    found = drawn.outcome(program)
    bad = {k for m in found.modules if m.verdict != LOADS for k in m.keys}
    return drawn.behind(bad | {name for f in found.findings for name in f.names})


def unloadable(
    plan: ConvertPlan, program: Program, limits: Limits, how: Mapping[str, Any]
) -> list[str]:
    """Names of the changes that a program would not load, or not load right; as `settled`."""
    return _unloaded(_Drawn.of(plan, limits, how), program)


def without_misfits(
    adapter: Adapter, dialect: str, limits: Limits, program: Program | None = None, **how: Any
) -> tuple[Adapter, tuple[str, ...]]:
    """The adapter less what a dialect has no place for and a program does not load.

    Args:
        adapter: as made.
        dialect: that it is for.
        limits: of memory and threads.
        program: None = any.
        how: of `loratool.dialects.write_adapter_files`.

    Returns:
        (adapter, names of what is left out).
    """
    row = row_of(dialect)
    naming = "" if row.table is None else row.table.naming
    located = locate(adapter, naming) if naming else []
    out = dict.fromkeys(unheld(adapter, row, located))
    while program is not None and not out.keys() >= set(changes_of(adapter)):
        drawn = _plain(plan_convert(less(adapter, out), dialect), program, limits, how)
        found = drawn.outcome(program)
        named = {name for f in found.findings if found.verdict in BAD for name in f.names}
        named |= {k for m in found.modules if m.module in named for k in m.keys}
        if not (more := drawn.behind(named)):
            break
        out |= dict.fromkeys(more)
    return less(adapter, out), tuple(out)


def _skipping(
    program: Program, source: Adapter, dialect: str, limits: Limits, how: Mapping[str, Any]
) -> str | None:
    """The command that leaves out what does not load; None if nothing would be left that does."""
    kept, out = without_misfits(source, dialect, limits, program, **how)
    words = skips(source, out) if kept.specs and out else ""
    if not words:
        return None
    rest = _plain(plan_convert(kept, dialect), program, limits, how)
    if rest.outcome(program).verdict in BAD:
        return None
    command = shlex.join(["loratool", "convert", str(source.path), "--for", program.name])
    return f"{command} {words} -o OUT{row_of(dialect).suffixes[0]} leaves them out"
