"""``check --fix``: the same change, in a form that the program loads."""

from __future__ import annotations

import re
from typing import Any

from loratool.adapter import Adapter
from loratool.api.access import access_of
from loratool.api.common import Limits
from loratool.api.loading import Goal, home_for, plan_translation
from loratool.api.session import Session
from loratool.api.translating import carry_out, files_of
from loratool.dialects.metadata import hashed
from loratool.dialects.programs import Look, Program
from loratool.dialects.rules import is_folder, passed_on, with_text_models
from loratool.errors import list_some
from loratool.frozen import replace
from loratool.options import groups
from loratool.options.looking import Check
from loratool.options.shaping import Convert
from loratool.options.words import options_of, recorded
from loratool.report.check import DROPPED, RAISES, CheckReport
from loratool.report.text import plural


def mend(report: CheckReport, look: Look, asked: Check, program: Program) -> CheckReport:
    """Write the adapter anew; the report says what was done and what could not be kept.

    Raises:
        LoratoolError: no form of the change loads: LT-488, LT-489, and what `rescale` and
            `convert` say.
    """
    if asked.base is None and program.is_of_images:
        assert look.adapter is not None
        home = home_for(program, look.adapter, Limits.of(asked))
        return _translated(report, asked, program, home)
    from loratool.api.convert import convert

    (row,) = convert([asked.adapter], **_shared(asked)).adapters
    output = "" if asked.dry_run else row.output
    return replace(report, output=output, fixed=row.notes, warnings=row.warnings)


def _shared(asked: Check) -> dict[str, Any]:
    """The options that `convert` has too."""
    names = {o.name for o in options_of(Check)} & {o.name for o in options_of(Convert)}
    return {name: getattr(asked, name) for name in names}


def _translated(
    report: CheckReport, asked: Check, program: Program, dialect: str
) -> CheckReport:  # fmt: skip
    """By names, alphas and plain factors of another dialect."""
    session = Session(
        "check", str(asked.output), asked.take(groups.Write), asked.take(groups.Read),
        access_of(asked, in_place=asked.dry_run), Limits.of(asked),
    )  # fmt: skip
    (one,) = session.open([str(asked.adapter)], form=lambda _: dialect)
    lost = {n for f in report.findings if f.verdict in (DROPPED, RAISES) for n in f.names}
    left = [ref.name for ref in passed_on(one.adapter) if lost & {ref.name} or not _is_home(
        one.adapter, dialect)]  # fmt: skip
    skip = [f"^{re.escape(name.rpartition('.')[0] or name)}$" for name in left]
    source = replace(with_text_models(one.adapter), key_order=())
    plan = plan_translation(source, Goal(dialect, session.limits, program), skip=skip)
    fixed = (
        [f"{plural(len(plan.computed), 'module')} computed anew as LoRA"] if plan.computed else []
    )
    if not asked.dry_run:
        with session.outputs(1) as session:
            session.check_place(one)
            made = carry_out(plan, session.limits)
            files = hashed(files_of(made.adapter, dialect, plan.source.metadata))
            session.put(files, one.target, session.record(recorded(asked), one.inputs()), {})
        fixed += [f"what was computed is off by {made.relative_error:.1e} of its ΔW"] * bool(
            made.relative_error)  # fmt: skip
    warnings = [f"left out: {list_some(left, 3)}"] if left else []
    output = "" if asked.dry_run else str(one.target)
    return replace(report, output=output, fixed=(*fixed, *plan.notes), warnings=tuple(warnings))


def _is_home(adapter: Adapter, dialect: str) -> bool:
    return adapter.dialect == dialect or is_folder(dialect)
