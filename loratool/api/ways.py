"""The form in which a program loads an adapter: how it is planned, and whether there is one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loratool.adapter import Adapter
from loratool.api.common import Limits
from loratool.api.loading import Goal, home_for, plan_translation
from loratool.api.translating import of_dialect
from loratool.delta.forms import blank_pair
from loratool.dialects import DEFAULT
from loratool.dialects.base import Dialect
from loratool.dialects.programs import Look, Program
from loratool.dialects.registry import home_of
from loratool.dialects.stated import as_lora, from_base
from loratool.errors import LoratoolError
from loratool.frozen import replace
from loratool.ops.convert import ConvertPlan, outline, plan_convert
from loratool.ops.fitting import left_out, plan_fit, without_whole
from loratool.store.checkpoint import Checkpoint


def takes_one_form(program: Program | None, row: Dialect) -> Program | None:
    """A program that takes one rank and one α/r of all modules; None for others, and own forms."""
    is_one = program is not None and program.is_of_peft and row.name == DEFAULT
    return program if is_one else None


def plan_form(
    adapter: Adapter, row: Dialect, program: Program, limits: Limits,
    base: Checkpoint | None = None, *, skip: Sequence[str] = (), is_freed: bool = False,
) -> ConvertPlan:  # fmt: skip
    """Plan an adapter as a program loads it, but for one rank and one α/r of all modules.

    Args:
        adapter: opened.
        row: the dialect to write.
        program: that shall load it.
        limits: of memory and threads.
        base: says sizes and names.
        skip: as of `plan_convert`.
        is_freed: the base has been used already, for what depends on it.

    Raises:
        MismatchError: of `plan_translation`; LT-488, LT-489, LT-461, it loads no form of it.
    """
    kept, gone = adapter, list[str]()
    if program.native == row.name:
        kept, gone = without_whole(adapter, program)
    one = takes_one_form(program, row)
    is_plain = one is not None and bool(one.obstacles(Look.of(kept)))
    of_plan: dict[str, Any] = {"base": base, "skip": skip, "is_freed": is_freed}
    if one is not None:
        plan = plan_convert(kept, row.name, is_plain=is_plain, **of_plan)
        plan = replace(plan, adapter=as_lora(plan.adapter)) if is_plain else plan
        gone = list(plan_fit(of_dialect(outline(plan), row.name), one).left_out)
        return replace(plan, warnings=(*plan.warnings, *left_out(program, gone)))
    how = {"base_config": base.config if base else None,
           "base_tensors": tuple(base.tensors) if base else ()}  # fmt: skip
    plan = plan_translation(kept, Goal(row.name, limits, program, how), **of_plan)
    return replace(plan, warnings=(*plan.warnings, *left_out(program, gone)))


def way_to_load(adapter: Adapter, program: Program, limits: Limits) -> str | None:
    """What ``--fix`` needs so that a program loads an adapter, as far as headers tell.

    Returns:
        "" nothing; ``--base``, since changes depend on it; None = nothing helps.
    """
    if _loads(adapter, program, limits):
        return ""
    freed = _freed(adapter)
    return "--base" if freed is not adapter and _loads(freed, program, limits) else None


def _loads(adapter: Adapter, program: Program, limits: Limits) -> bool:
    is_own = bool(program.native) and adapter.dialect == program.native
    row = home_of(program.native if is_own else home_for(program, adapter, limits) or DEFAULT)
    try:
        plan_form(adapter, row, program, limits)
    except LoratoolError:
        return False
    return True


def _freed(adapter: Adapter) -> Adapter:
    """What it will look like once the base has made LoRA of all changes that need it."""
    adapter = from_base(adapter)
    needed = [s for s in adapter.specs if not s.is_fixed or s.is_open]
    if not needed:
        return adapter
    names = {s.name for s in needed}
    specs = (blank_pair(s, 1) if s.name in names else s for s in adapter.specs
             if s.name not in names or not s.row.is_companion)  # fmt: skip
    return as_lora(replace(adapter, specs=tuple(specs), key_order=()))
