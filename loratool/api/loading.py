"""An adapter in a dialect as a program loads it: every command with ``--to`` and ``--for``."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from loratool.adapter import Adapter, AdapterFiles, DeltaSpec
from loratool.api.common import Limits
from loratool.api.translating import Translated, blank, carry_out, files_of
from loratool.dialects.programs import Look, Program
from loratool.dialects.readback import is_known_by_names
from loratool.dialects.registry import row_of
from loratool.errors import LoratoolError, MismatchError, list_some
from loratool.frozen import Frozen, field, replace
from loratool.ops.convert import ConvertPlan, compute_also, outline, plan_convert
from loratool.ops.fitting import freeing, leaving_out
from loratool.ops.leaving import changes_of, less, skips, unheld
from loratool.ops.locating import locate
from loratool.ops.renaming import renamed
from loratool.report.base import GOOD
from loratool.report.check import LOADS, Simulation


class Goal(Frozen):
    """What an adapter shall become.

    Attributes:
        dialect: to write it in.
        limits: of memory and threads.
        program: that shall load it; None = any.
        how: of `loratool.dialects.write_adapter_files`.
    """

    dialect: str
    limits: Limits
    program: Program | None = None
    how: Mapping[str, Any] = field(default_factory=dict)


def translate(adapter: Adapter, goal: Goal) -> Translated:
    """Bring an adapter that a command made into a dialect, as a program loads it.

    Raises:
        MismatchError: of `plan_translation`.
        DiskError: LT-605.
    """
    return carry_out(plan_translation(adapter, goal), goal.limits)


def plan_translation(adapter: Adapter, goal: Goal, **of_plan: Any) -> ConvertPlan:
    """The plan of `translate`.

    Args:
        adapter: as it is.
        goal: what it shall become.
        of_plan: of `loratool.ops.convert.plan_convert`.

    Raises:
        MismatchError: LT-411, the dialect has no names for it; LT-488, the program loads no such
            adapter; others of `plan_convert`.
    """
    program = goal.program
    if program is None:
        plan = plan_convert(adapter, goal.dialect, **of_plan)
        require_spelled(plan, goal)
        return plan
    try:
        plan = plan_convert(adapter, goal.dialect, **of_plan)
    except MismatchError as problem:
        if problem.code != "LT-494":
            raise
        raise MismatchError(
            "LT-488", f"{program.title} cannot load such an adapter", file=adapter.path,
            key=problem.key, got=problem.got,
            hint=freeing(program, adapter) or _skipping(program, adapter, goal),
        ) from None  # fmt: skip
    try:
        return _settled(plan, goal)
    except MismatchError as problem:
        if adapter.key_order:
            again = replace(adapter, key_order=())  # the same under the spellings of new files
            return plan_translation(again, goal, **of_plan)
        if problem.code != "LT-411":
            raise
        raise MismatchError(
            "LT-488", f"{program.title} cannot load such an adapter", file=adapter.path,
            key=problem.key, expected=problem.expected, got=problem.got,
        ) from None  # fmt: skip


def require_spelled(plan: ConvertPlan, goal: Goal) -> None:
    """Refuse, before any work, what a dialect has no names for.

    Raises:
        MismatchError: LT-411, and others of `loratool.dialects.write_adapter_files`.
    """
    if is_known_by_names(plan.row):
        made = carry_out(plan, goal.limits, is_dry=True).adapter
        files_of(made, plan.row.name, plan.source.metadata, **goal.how)


def home_for(program: Program, adapter: Adapter, limits: Limits) -> str:
    """The dialect that a program loads an adapter best in, "" for the folders of PEFT.

    Whether a dialect will do may show in its names alone: it is asked of what would be written.
    """
    name = program.home(Look.of(adapter))
    if name in ("", adapter.dialect) or not any(rule.home for rule in program.rules):
        return name
    try:
        drawn = _Drawn.of(plan_convert(adapter, name), Goal(name, limits, program))
    except LoratoolError:
        return name
    return program.home(drawn.look)


class _Drawn(Frozen):
    """What a plan would write, with tensors without content.

    Attributes:
        plan: into the dialect that the program loads best.
        specs: as written.
        files: as written.
        program: that shall load them.
        look: at them.
        found: what it makes of them.
    """

    plan: ConvertPlan
    specs: tuple[DeltaSpec, ...]
    files: AdapterFiles
    program: Program
    look: Look
    found: Simulation

    @classmethod
    def of(cls, plan: ConvertPlan, goal: Goal) -> _Drawn:
        """For a program: there is one."""
        assert goal.program is not None
        made = carry_out(plan, goal.limits, is_dry=True).adapter
        files = files_of(made, plan.row.name, plan.source.metadata, **goal.how)
        look = Look.of_files(files, plan.row.name, made.specs)
        return cls(plan, made.specs, files, goal.program, look, goal.program.simulate(look))

    @property
    def is_loaded(self) -> bool:
        """False for what is not written for the program."""
        return self.found.verdict in GOOD

    def unloaded(self) -> list[str]:
        """Names of the changes that it would not load, or not load right."""
        bad = {k for m in self.found.modules if m.verdict != LOADS for k in m.keys}
        return self.behind(bad | {name for f in self.found.findings for name in f.names})

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


def _settled(plan: ConvertPlan, goal: Goal) -> ConvertPlan:
    """The plan, with plain factors for what a program does not load as it is."""
    drawn = _plain(plan, goal)
    if drawn.is_loaded:
        return drawn.plan
    program, found = drawn.program, drawn.found
    names = found.deciding[0].names
    raise MismatchError(
        "LT-488", f"{program.title} cannot load such an adapter", file=plan.source.path,
        got=list_some(found.reasons), key=list_some(names, 3) or None,
        hint=freeing(program, plan.source) or leaving_out(program, plan.source, names)
        or _skipping(program, plan.source, goal),
    )  # fmt: skip


def _plain(plan: ConvertPlan, goal: Goal) -> _Drawn:
    drawn = _Drawn.of(plan, goal)
    again = compute_also(plan, drawn.unloaded())
    is_same = again.computed.keys() == plan.computed.keys()
    return drawn if is_same else _Drawn.of(again, goal)


def unloadable(plan: ConvertPlan, goal: Goal) -> list[str]:
    """Names of the changes that a program would not load, or not load right."""
    return _Drawn.of(plan, goal).unloaded()


def without_misfits(adapter: Adapter, goal: Goal) -> tuple[Adapter, tuple[str, ...]]:
    """The adapter less what a dialect has no place for and a program does not load.

    Returns:
        (adapter, names of what is left out).
    """
    row = row_of(goal.dialect)
    naming = "" if row.table is None else row.table.naming
    located = locate(adapter, naming) if naming else []
    out = dict.fromkeys(unheld(adapter, row, located))
    while goal.program is not None and not out.keys() >= set(changes_of(adapter)):
        drawn = _plain(plan_convert(less(adapter, out), goal.dialect), goal)
        if drawn.is_loaded:
            break
        found = drawn.found
        named = {name for f in found.findings for name in f.names}
        named |= {k for m in found.modules if m.module in named for k in m.keys}
        if not (more := drawn.behind(named)):
            break
        out |= dict.fromkeys(more)
    return less(adapter, out), tuple(out)


def _skipping(program: Program, source: Adapter, goal: Goal) -> str | None:
    """The command that leaves out what does not load; None if nothing would be left that does."""
    kept, out = without_misfits(source, goal)
    words = skips(source, out) if kept.specs and out else ""
    if not words or not _plain(plan_convert(kept, goal.dialect), goal).is_loaded:
        return None
    command = shlex.join(["loratool", "convert", str(source.path), "--for", program.name])
    return f"{command} {words} -o OUT{row_of(goal.dialect).suffixes[0]} leaves them out"
