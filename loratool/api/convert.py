"""`convert`: the same change, as another program stores it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loratool.adapter import Adapter, AdapterFiles, TensorRef
from loratool.api.fitting import check_files, fit_for
from loratool.api.session import Opened, Session, base_row
from loratool.api.translating import carry_out, files_of, of_dialect, settled, threads_for
from loratool.dialects import DEFAULT
from loratool.dialects.base import Dialect
from loratool.dialects.metadata import LENGTHS, edited, hashed, parse_edits
from loratool.dialects.programs import OF_PEFT, Look, Program, judge_loads
from loratool.dialects.registry import home_of, writable
from loratool.errors import UsageError
from loratool.ops.convert import ConvertPlan, plan_convert
from loratool.ops.input_notes import unused_warnings
from loratool.ops.inputs import OpenedBase, open_base
from loratool.ops.turns import Turns
from loratool.options.calls import takes
from loratool.options.shaping import Convert
from loratool.options.words import recorded
from loratool.report.convert import ConvertedAdapter, ConvertReport
from loratool.store.adapter_writer import file_bytes


@dataclass(frozen=True)
class _Job:
    """One adapter with its plan."""

    session: Session
    one: Opened
    plan: ConvertPlan
    row: Dialect
    base: OpenedBase | None
    edits: Mapping[str, str]


@takes(Convert)
def convert(asked: Convert) -> ConvertReport:
    """Write adapters in another dialect.

    The bytes of factors are copied; only what the other dialect has no place for is computed (a
    Tucker core goes into lora_A, a LoHa becomes a LoRA), and only that needs torch.  Flat names
    become those of the base, or of Stable Diffusion, SDXL and FLUX where none is given.  What the
    dialect cannot hold is an error unless ``skip`` leaves it out.

    Raises:
        LoratoolError: see ``docs/errors.md``.

    Example:
        >>> lt.convert(["style"], to="kohya", output="style.safetensors").adapters[0].copied
        28
    """
    edits = _edits(asked)
    session = Session.begin("convert", asked, in_place=asked.dry_run)
    program = session.program
    found = session.open([str(text) for text in asked.adapters], asked.base,
                         form=lambda adapter: _form(adapter, asked, program))  # fmt: skip
    adapters = [one.adapter for one in found]
    base = None if asked.base is None else open_base(str(asked.base), adapters, session.access)
    is_asked = asked.to is not None or program is not None
    jobs = [_job(session, one, base, asked.skip, edits, is_asked=is_asked) for one in found]
    for job in jobs:
        threads_for(job.plan, session.limits)  # before any work, whether it fits
    if asked.dry_run:
        made = [carry_out(job.plan, session.limits, is_dry=True) for job in jobs]
        rows = [_row(job, _files(job, one.adapter), 0.0)
                for job, one in zip(jobs, made, strict=True)]  # fmt: skip
    else:
        with session.outputs(len(jobs)) as session:
            session.make_folder(len(jobs))
            for job in jobs:
                session.check_place(job.one)
            turns = Turns(asked.progress, asked.on_work, [job.one.nbytes for job in jobs])
            rows = [_run(replace(job, session=session), recorded(asked))
                    for job in turns.each(jobs, lambda job: job.one.text)]  # fmt: skip
    dialects = {job.row.name: None for job in jobs}
    return ConvertReport(
        str(asked.output), ", ".join(dialects), tuple(rows), session.seconds, asked.dry_run
    )


def _form(adapter: Adapter, asked: Convert, program: Program | None) -> str:
    """The dialect of a result: as asked for, or that which the program loads best.

    A program's own form is asked for where the output has its suffix.
    """
    if asked.to is not None or program is None:
        return asked.to or adapter.dialect
    own = program.native and home_of(program.native)
    if own and not own.is_folder and Path(asked.output).suffix in own.suffixes:
        return own.name
    return program.home(Look.of(adapter)) or DEFAULT


def _job(
    session: Session, one: Opened, base: OpenedBase | None, skip: Sequence[str],
    edits: Mapping[str, str], *, is_asked: bool,
) -> _Job:  # fmt: skip
    row, program = home_of(one.form), session.program
    checkpoint = None if base is None else base.checkpoint
    plan = plan_convert(one.adapter, row.name, base=checkpoint, skip=skip,
                        keeps_names=not is_asked)  # fmt: skip
    if program is not None and _of_peft(program, row) is None:
        plan = settled(plan, program, session.limits, **_of_base(base, plan))
    return _Job(session, one, plan, row, base, edits)


def _edits(asked: Convert) -> dict[str, str]:
    """The entries of the metadata that change.

    Raises:
        UsageError: LT-275; LT-276, nothing is asked for; LT-282, no such dialect.
    """
    edits = parse_edits(asked.metadata, asked.trigger)
    if asked.to is not None:
        writable(asked.to)
    elif not edits and asked.program is None:
        raise UsageError("LT-276", "nothing to convert to", expected="--to DIALECT or --for "
                         "PROGRAM, or --set, --trigger to change metadata alone")  # fmt: skip
    return edits


def _run(job: _Job, options: Mapping[str, Any]) -> ConvertedAdapter:
    made, session = carry_out(job.plan, job.session.limits), job.session
    adapter, program = made.adapter, _of_peft(session.program, job.row)
    if program is not None:
        adapter = of_dialect(adapter, job.row.name)
    fitted = fit_for(adapter, program, session.limits)
    files = hashed(_files(job, fitted.adapter))
    check_files(files, adapter, program)
    inputs = job.one.inputs()
    if job.base is not None:
        inputs |= base_row(job.base, inputs)
    record = job.session.record(options, inputs)
    _, written = job.session.put(files, job.one.target, record, made.adapter.extras)
    row = _row(job, files, math.hypot(made.relative_error, fitted.relative_error))
    return replace(row, loads_in=judge_loads(written), notes=(*row.notes, *fitted.notes),
                   warnings=(*row.warnings, *fitted.warnings))  # fmt: skip


def _of_peft(program: Program | None, row: Dialect) -> Program | None:
    """A program that takes one rank and one α/r of all modules; None for others, and own forms."""
    return program if program in OF_PEFT and row.name == DEFAULT else None


def _files(job: _Job, adapter: Adapter) -> AdapterFiles:
    before = job.plan.source.metadata
    files = files_of(
        adapter, job.row.name, before, **_of_base(job.base, job.plan),
    )  # fmt: skip
    return edited(files, before, job.edits)


def _of_base(base: OpenedBase | None, plan: ConvertPlan) -> dict[str, Any]:
    """What a writer may ask of the base."""
    return {"base_config": base.checkpoint.config if base else None,
            "base_tensors": plan.base_tensors}  # fmt: skip


def _row(job: _Job, files: AdapterFiles, error: float) -> ConvertedAdapter:
    plan = job.plan
    copied = sum(isinstance(source, TensorRef) for _, source in files.tensors)
    warnings = [*unused_warnings(plan.source), *plan.warnings]
    return ConvertedAdapter(
        source=job.one.text,
        output=str(job.one.target),
        dialect=plan.source.dialect,
        modules=len(plan.adapter.specs),
        copied=copied,
        computed=tuple(plan.computed),
        relative_error=error,
        left_out=plan.left_out,
        output_bytes=file_bytes(files),
        metadata=dict(job.edits),
        hashes=tuple(k for k in LENGTHS if plan.source.metadata.get(k) != files.metadata.get(k)),
        warnings=tuple(warnings),
        notes=plan.notes,
    )
