"""`convert`: the same change, as another program stores it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from loratool.adapter import Adapter, AdapterFiles, TensorRef
from loratool.api.casting import Cast, blank_cast, cast, files_in, is_in, said
from loratool.api.common import Limits, parse_dtype
from loratool.api.fitting import check_files, fit_for
from loratool.api.freeing import dependent, free_of_base, outline_free, unholdable
from loratool.api.loading import Goal, home_for, plan_translation, unloadable
from loratool.api.session import Opened, Session, base_row
from loratool.api.several import every_one, texts_of
from loratool.api.translating import carry_out, files_of, memory_for, of_dialect
from loratool.api.ways import plan_form, takes_one_form
from loratool.dialects import DEFAULT
from loratool.dialects.base import Dialect
from loratool.dialects.metadata import LENGTHS, edited, hashed, parse_edits
from loratool.dialects.programs import Look, Program, judge_loads
from loratool.dialects.registry import home_of, writable
from loratool.dialects.stated import from_base
from loratool.errors import UsageError
from loratool.frozen import Frozen, replace
from loratool.ops.convert import ConvertPlan, needs_arithmetic, plan_convert
from loratool.ops.input_notes import unused_warnings
from loratool.ops.inputs import OpenedBase, open_base
from loratool.options.calls import takes
from loratool.options.shaping import Convert
from loratool.options.words import recorded
from loratool.report.convert import ConvertedAdapter, ConvertReport
from loratool.store.adapter_writer import file_bytes


class _Job(Frozen):
    """One adapter on its way.

    Attributes:
        asked: the options.
        session: of the command.
        one: the adapter and its place.
        row: the other dialect.
        base: opened, if there is one.
        edits: entries of the metadata that change.
    """

    asked: Convert
    session: Session
    one: Opened
    row: Dialect
    base: OpenedBase | None
    edits: Mapping[str, str]

    def plan_of(self, adapter: Adapter) -> ConvertPlan:
        """The plan of an adapter, in a form that the program loads."""
        asked, program = self.asked, self.session.program
        base = None if self.base is None else self.base.checkpoint
        is_freed = adapter is not self.one.adapter
        if program is not None:
            return plan_form(adapter, self.row, program, self.session.limits, base,
                             skip=asked.skip, is_freed=is_freed)  # fmt: skip
        return plan_translation(
            adapter, Goal(self.row.name, self.session.limits), base=base, skip=asked.skip,
            keeps_names=asked.to is None, is_freed=is_freed,
        )  # fmt: skip

    @property
    def dtype(self) -> str | None:
        """Safetensors name of the type asked for; None = as it is."""
        return parse_dtype(self.asked.dtype)

    @property
    def rank(self) -> int | None:
        """Of what is made independent of the base, at most: as asked, or what a program takes."""
        if self.asked.rank is not None:
            return self.asked.rank
        program = takes_one_form(self.session.program, self.row)
        return program.ranks[-1] if program is not None and program.ranks else None

    def freed(self) -> set[str]:
        """Names of the changes that must be made independent of the base, which is given."""
        adapter, program = self.one.adapter, self.session.program
        found = unholdable(adapter, self.row)
        others = {s.name for s in dependent(adapter)} - found
        if program is None or not others or self.base is None:
            return found
        if takes_one_form(program, self.row) is not None:
            return found | others if program.obstacles(Look.of(adapter)) else found
        outlined = outline_free(adapter, found, self.base.checkpoint, self.rank, self.row)
        plan = plan_convert(outlined, self.row.name, base=self.base.checkpoint,
                            skip=self.asked.skip)  # fmt: skip
        goal = Goal(self.row.name, self.session.limits, program, _of_base(self.base, plan))
        return found | others.intersection(unloadable(plan, goal))


class _Planned(Frozen):
    """An adapter with its plan, and the changes that are freed of the base before."""

    job: _Job
    plan: ConvertPlan
    freed: frozenset[str] = frozenset()

    @classmethod
    def of(cls, job: _Job) -> _Planned:
        """The plan, with factors without content for what is still to be computed."""
        adapter, base = job.one.adapter, job.base
        names = frozenset() if base is None else frozenset(job.freed())
        if names and base is not None:
            adapter = outline_free(adapter, names, base.checkpoint, job.rank, job.row)
        return cls(job, job.plan_of(adapter), names)

    def computed(self) -> tuple[_Planned, float]:
        """The plan of what was made with the base, and the error of that."""
        job = self.job
        if not self.freed or job.base is None:
            return self, 0.0
        done = free_of_base(job.one.adapter, self.freed, job.base, job.rank, job.row,
                            job.session.limits)  # fmt: skip
        plan = job.plan_of(done.adapter)
        return replace(self, plan=replace(plan, notes=(*done.notes, *plan.notes))), (
            done.relative_error
        )


@takes(Convert)
def convert(asked: Convert) -> ConvertReport:
    """Write adapters in another dialect.

    The bytes of factors are copied; only what the other dialect has no place for is computed (a
    Tucker core goes into lora_A, a LoHa becomes a LoRA), and only that needs torch.  Flat names
    become those of the base, or of Stable Diffusion, SDXL and FLUX where none is given.  What the
    dialect cannot hold is an error unless ``skip`` leaves it out.  With the base, changes that
    depend on it (DoRA, OFT, PiSSA) become LoRA where the dialect or the program knows no other:
    exact, or the best of a ``rank``, with the error in the report.

    Raises:
        LoratoolError: see ``docs/errors.md``.

    Example:
        >>> lt.convert(["style"], to="kohya", output="style.safetensors").adapters[0].copied
        28
    """
    return every_one(asked, _convert, lambda done: {
        "output": str(asked.output),
        "dialect": ", ".join(dict.fromkeys(report.dialect for report in done)),
    })  # fmt: skip


def _convert(asked: Convert) -> ConvertReport:
    edits = _edits(asked)
    session = Session.begin("convert", asked, in_place=asked.dry_run)
    program = session.program
    found = session.open(texts_of(asked.adapters), asked.base,
                         form=lambda adapter: _form(adapter, asked, program))  # fmt: skip
    adapters = [one.adapter for one in found]
    base = None if asked.base is None else open_base(str(asked.base), adapters, session.access)
    if base is not None:
        found = [_from_base(one, program) for one in found]
    jobs = [_Planned.of(_Job(asked, session, one, home_of(one.form), base, edits)) for one in found]
    memory = [memory_for(one.plan, session.limits) for one in jobs]  # whether it fits, before work
    if asked.dry_run:
        made = [carry_out(one.plan, session.limits, is_dry=True) for one in jobs]
        rows = [_drawn(one, done.adapter) for one, done in zip(jobs, made, strict=True)]
    else:
        modules = sum(len(one.plan.adapter.specs) for one in jobs)
        is_freed = any(one.freed for one in jobs)
        told = not is_freed and asked.dtype == "auto"
        computed = sum(len(one.plan.computed) for one in jobs) if told else None
        peaks = (m.peak_bytes for m in memory if m is not None)
        with session.making(found, asked, modules, computed, peaks) as (session, turns):
            rows = [_run(replace(one, job=replace(one.job, session=session)), recorded(asked),
                         turns.part(0, 1))
                    for one in turns.each(jobs, lambda one: one.job.one.text)]  # fmt: skip
    dialects = {one.job.row.name: None for one in jobs}
    return ConvertReport(
        str(asked.output), ", ".join(dialects), tuple(rows), session.seconds, asked.dry_run
    )


def _from_base(one: Opened, program: Program | None) -> Opened:
    """Without copies of the base as a change began from it, where there is no place for them."""
    holds = home_of(one.form).holds_whole and (program is None or program.holds_whole_tensors)
    return one if holds else replace(one, adapter=from_base(one.adapter))


def _form(adapter: Adapter, asked: Convert, program: Program | None) -> str:
    """The dialect of a result: as asked for, or that which the program loads best.

    A program's own form is asked for where the output has its suffix.
    """
    if asked.to is not None or program is None:
        return asked.to or adapter.dialect
    own = program.native and home_of(program.native)
    if own and not own.is_folder and Path(asked.output).suffix in own.suffixes:
        return own.name
    return home_for(program, adapter, Limits.of(asked)) or DEFAULT


def _edits(asked: Convert) -> dict[str, str]:
    """The entries of the metadata that change.

    Raises:
        UsageError: LT-275; LT-276, nothing is asked for; LT-282, no such dialect.
    """
    edits = parse_edits(asked.metadata, asked.trigger)
    if asked.to is not None:
        writable(asked.to)
    elif not edits and asked.program is None and parse_dtype(asked.dtype) is None:
        raise UsageError("LT-276", "nothing to convert to", expected="--to DIALECT or --for "
                         "PROGRAM, --dtype, or --set, --trigger to change metadata alone",
                         )  # fmt: skip
    return edits


def _run(
    planned: _Planned, options: Mapping[str, Any], progress: Callable[[int, int], None]
) -> ConvertedAdapter:
    job, session = planned.job, planned.job.session
    planned, lost = planned.computed()
    if job.dtype is not None and needs_arithmetic(planned.plan):  # so that it is rounded once
        wide = cast(planned.plan.adapter, "F32", session.limits).adapter
        planned = replace(planned, plan=replace(planned.plan, adapter=wide))
    made = carry_out(planned.plan, session.limits)
    adapter, program = made.adapter, takes_one_form(session.program, job.row)
    if program is not None:
        adapter = of_dialect(adapter, job.row.name)
    fitted = fit_for(adapter, program, session.limits)
    files, stored = _stored(planned, fitted.adapter, lambda a, d: cast(a, d, session.limits))
    files = hashed(files)
    check_files(files, adapter, program)
    inputs = job.one.inputs()
    if job.base is not None:
        inputs |= base_row(job.base, inputs)
    record = session.record(options, inputs)
    size, written = session.put(files, job.one.target, record, made.adapter.extras, progress)
    lost = math.hypot(lost, made.relative_error, fitted.relative_error,
                      0.0 if stored is None else stored.relative_error)  # fmt: skip
    row = _row(planned, files, lost, stored)
    return replace(row, output_bytes=size, loads_in=judge_loads(written),
                   notes=(*row.notes, *fitted.notes),
                   warnings=tuple(dict.fromkeys((*row.warnings, *fitted.warnings))))  # fmt: skip


def _drawn(planned: _Planned, adapter: Adapter) -> ConvertedAdapter:
    """What would be written, of factors without content."""
    files, stored = _stored(planned, adapter, blank_cast)
    return _row(planned, files, 0.0, stored)


def _stored(
    planned: _Planned, adapter: Adapter, turn: Callable[[Adapter, str], Cast]
) -> tuple[AdapterFiles, Cast | None]:
    """The files of a result, and how its factors came into the type that was asked for."""
    job, dtype = planned.job, planned.job.dtype
    if dtype is None or (is_in(job.one.adapter, dtype) and is_in(adapter, dtype)):
        return _files(planned, adapter), None
    return files_in(adapter, job.row, lambda a: _files(planned, a), lambda a: turn(a, dtype))


def _files(planned: _Planned, adapter: Adapter) -> AdapterFiles:
    job, before = planned.job, planned.plan.source.metadata
    files = files_of(adapter, job.row.name, before, **_of_base(job.base, planned.plan))
    return edited(files, before, job.edits)


def _of_base(base: OpenedBase | None, plan: ConvertPlan) -> dict[str, Any]:
    """What a writer may ask of the base."""
    return {"base_config": base.checkpoint.config if base else None,
            "base_tensors": plan.base_tensors}  # fmt: skip


def _row(
    planned: _Planned, files: AdapterFiles, error: float, stored: Cast | None
) -> ConvertedAdapter:
    job, plan = planned.job, planned.plan
    notes, of_type = ((), ()) if stored is None or job.dtype is None else said(stored, job.dtype)
    copied = sum(isinstance(source, TensorRef) for _, source in files.tensors)
    warnings = [*unused_warnings(plan.source), *plan.warnings, *of_type]
    if job.asked.rank is not None and not planned.freed:
        warnings.append(
            "--rank changes nothing: no change becomes LoRA with the base; "
            f"loratool compress --rank {job.asked.rank} cuts what there is"
        )
    return ConvertedAdapter(
        source=job.one.text,
        output=str(job.one.target),
        dialect=plan.source.dialect,
        modules=len(plan.adapter.specs),
        copied=copied,
        computed=(*plan.computed, *sorted(planned.freed)),
        relative_error=error,
        left_out=plan.left_out,
        output_bytes=file_bytes(files),
        metadata=dict(job.edits),
        hashes=tuple(k for k in LENGTHS if plan.source.metadata.get(k) != files.metadata.get(k)),
        warnings=tuple(warnings),
        notes=(*plan.notes, *notes),
    )
