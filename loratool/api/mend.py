"""``check --fix``: the same change, in a form that the program loads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from loratool.adapter import Adapter, AdapterFiles, TensorRef
from loratool.api.access import access_of
from loratool.api.common import Limits
from loratool.api.session import Session
from loratool.api.translating import Translated, carry_out, files_of
from loratool.dialects.metadata import hashed
from loratool.dialects.programs import Look, Program
from loratool.dialects.rules import is_folder, passed_on, with_text_models
from loratool.errors import MismatchError, list_some
from loratool.ops.convert import ConvertPlan, compute_also, plan_convert
from loratool.options import groups
from loratool.options.looking import Check
from loratool.options.shaping import Rescale
from loratool.options.words import options_of, recorded
from loratool.report.check import DROPPED, LOADS, RAISES, CheckReport, Simulation
from loratool.store.adapter_writer import write_adapter


def mend(report: CheckReport, look: Look, asked: Check, program: Program) -> CheckReport:
    """Write the adapter anew; the report says what was done and what could not be kept.

    Raises:
        LoratoolError: no form of the change loads: LT-488, LT-489, and what `rescale` and
            `convert` say.
    """
    assert asked.output is not None
    dialect = program.home(look)
    if dialect:
        return _translated(report, asked, program, dialect)
    from loratool.api.rescale import rescale

    names = {o.name for o in options_of(Check)} & {o.name for o in options_of(Rescale)}
    shared = {name: getattr(asked, name) for name in names - {"output", "program"}}
    made = rescale([asked.adapter], 1.0, output=asked.output, program=program.name, **shared)
    (row,) = made.adapters
    return replace(report, output=row.output, fixed=row.notes, warnings=row.warnings)


def _translated(
    report: CheckReport, asked: Check, program: Program, dialect: str
) -> CheckReport:  # fmt: skip
    """By names, alphas and plain factors of another dialect."""
    session = Session(
        "check", str(asked.output), asked.take(groups.Write), asked.take(groups.Read),
        access_of(asked, in_place=asked.dry_run), Limits.of(asked),
    )  # fmt: skip
    (one,) = session.open([str(asked.adapter)], form=dialect)
    lost = {n for f in report.findings if f.verdict in (DROPPED, RAISES) for n in f.names}
    left = [r for r in passed_on(one.adapter)
            if r.name in lost or not _is_home(one.adapter, dialect)]  # fmt: skip
    skip = [f"^{re.escape(ref.name.rpartition('.')[0] or ref.name)}$" for ref in left]
    source = replace(with_text_models(one.adapter), key_order=())
    plan = plan_convert(source, dialect, skip=skip)
    plan, found = _settle(plan, dialect, program, session.limits)
    if found.verdict in ("no", "wrong"):
        raise MismatchError(
            "LT-488", f"{program.title} cannot load such an adapter", file=asked.adapter,
            got=list_some(found.reasons), key=list_some(found.deciding[0].names, 3) or None,
        )  # fmt: skip
    fixed, beside = _computed(plan), one.target.with_suffix(".embeddings.safetensors")
    if not asked.dry_run:
        with session.outputs(1) as session:
            session.check_place(one)
            _split_off(left, beside, session)
            made = carry_out(plan, session.limits)
            files = hashed(_files(made, dialect))
            session.put(files, one.target, session.record(recorded(asked), one.inputs()), {})
        fixed += [f"what was computed is off by {made.relative_error:.1e} of its ΔW"] * bool(
            made.relative_error)  # fmt: skip
    names = list_some((ref.name for ref in left), 3)
    warnings = [f"it does not load {names}: they go into {beside.name}"] if left else []
    output = "" if asked.dry_run else str(one.target)
    return replace(report, output=output, fixed=(*fixed, *plan.notes), warnings=tuple(warnings))


def _computed(plan: ConvertPlan) -> list[str]:
    ranks = sorted({s.product_rank for s in plan.adapter.specs if s.name in plan.computed})
    words = f"modules are computed anew as LoRA of rank {list_some(map(str, ranks), 6)}"
    return [f"{len(plan.computed)} {words}"] if ranks else []


def _split_off(refs: Sequence[TensorRef], place: Path, session: Session) -> None:
    """Tensors that are no part of a change, under their names in a file of their own."""
    if refs:
        files = AdapterFiles(tuple((ref.name, ref) for ref in refs), {}, "")
        write_adapter(files, place, record={}, force=session.write.force)


def _is_home(adapter: Adapter, dialect: str) -> bool:
    return adapter.dialect == dialect or is_folder(dialect)


def _settle(
    plan: ConvertPlan, dialect: str, program: Program, limits: Limits
) -> tuple[ConvertPlan, Simulation]:
    """The plan, with plain factors for what the program does not load as it is."""
    found = _outcome(plan, dialect, program, limits)
    bad = {k for m in found.modules if m.verdict != LOADS for k in m.keys}
    bad |= {name for f in found.findings for name in f.names}
    names = [name for name, keys in _keys(plan, dialect, limits).items() if keys & bad]
    again = compute_also(plan, names)
    if again.computed.keys() == plan.computed.keys():
        return plan, found
    return again, _outcome(again, dialect, program, limits)


def _outcome(plan: ConvertPlan, dialect: str, program: Program, limits: Limits) -> Simulation:
    """What the program would make of the result."""
    files = _files(carry_out(plan, limits, is_dry=True), dialect)
    return program.simulate(Look.of_files(files, dialect))


def _keys(plan: ConvertPlan, dialect: str, limits: Limits) -> dict[str, set[str]]:
    """Name of a change -> the keys that its tensors get."""
    made = carry_out(plan, limits, is_dry=True)
    by_source = {id(source): key for key, source in _files(made, dialect).tensors}
    return {
        spec.name: {by_source[id(f)] for f in spec.fields.values() if id(f) in by_source}
        for spec in made.adapter.specs
    }


def _files(made: Translated, dialect: str) -> AdapterFiles:
    return files_of(made.adapter, dialect, made.plan.source.metadata)
