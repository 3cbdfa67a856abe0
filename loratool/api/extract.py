"""`extract`: a low-rank adapter from a full fine-tune."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.adapter import Adapter
from loratool.api.access import access_of, parse_size
from loratool.api.common import Limits, Resources, parse_dtype, plan_resources, run_id
from loratool.api.extract_assembly import Assembly, refuse_lost
from loratool.api.extract_job import ExtractJob
from loratool.api.extract_report import planned_report, wide_factors, written_report
from loratool.api.loading import Goal, plan_translation, without_misfits
from loratool.api.page import check_page, with_page
from loratool.api.session import base_row, run_plan
from loratool.api.side_file import may_replace
from loratool.api.translating import files_of
from loratool.bind.seen import in_layout_of
from loratool.dialects import DEFAULT, open_adapter
from loratool.dialects.base import Dialect
from loratool.dialects.programs import Look, Program, find_program
from loratool.dialects.readback import is_known_by_names
from loratool.dialects.registry import writable
from loratool.errors import MismatchError, UsageError, list_some
from loratool.frozen import replace
from loratool.ops.align import same_form
from loratool.ops.assemble import outline
from loratool.ops.batch import output_place
from loratool.ops.coded import read_plain
from loratool.ops.extract import ExtractPlan, FactorOptions, group_steps, plan_extract
from loratool.ops.fitting import check_fit
from loratool.ops.inputs import guard_output, open_base
from loratool.ops.rank_options import ranks_of
from loratool.ops.unchanged import without_equal
from loratool.options.calls import takes
from loratool.options.groups import Run
from loratool.options.shaping import Extract
from loratool.options.words import recorded
from loratool.report.extract import ExtractReport, SavedResidual
from loratool.store.adapter_writer import fill_adapter
from loratool.store.checkpoint import Checkpoint
from loratool.store.marker import MARKER
from loratool.store.outputs import check_output, open_output, place_of
from loratool.store.provenance import provenance_of
from loratool.store.staging import Making
from loratool.store.stamps import take_stamps

if TYPE_CHECKING:
    from loratool.location import Location
    from loratool.store.reader import Stamp
    from loratool.store.staging import Output


@takes(Extract)
def extract(asked: Extract) -> ExtractReport:
    """The best low-rank approximation of tuned - base, module by module, as a PEFT adapter.

    Criteria combine: the smallest rank wins.  Without any, the rank is ``auto``.

    Returns:
        Captured energy and error per module and in all; what was kept and left out.

    Raises:
        LoratoolError: see ``docs/errors.md``.

    Example:
        >>> lt.extract("tuned", base="base", output="lora", rank=4).rank
        4
    """
    check_page(asked.html, asked.output, asked.save_residual)
    return with_page(_extract(asked), asked.html)


def _extract(asked: Extract) -> ExtractReport:
    started = time.monotonic()
    job = _prepare(asked)
    resources = plan_resources(job.plan.plan, asked.take(Run), sample=asked.dry_run)
    if asked.dry_run or asked.on_plan is not None:
        planned = planned_report(job, resources, time.monotonic() - started)
        if asked.dry_run or asked.on_plan is None:
            return planned
        asked.on_plan(replace(planned, dry_run=False))
    job, record = _recorded(asked, job, resources)
    identity = run_id(job.plan.plan, resources.device)
    replaces = _check_residual_path(asked, job, identity)
    stamps = take_stamps(job.plan.plan.refs())
    residual = None
    from loratool.engine.factor_journal import drop_factors, factor_file

    with open_output(
        job.target,
        Making(
            is_folder=job.row.is_folder, plan_id=identity, force=asked.force,
            restart=asked.restart, inputs=stamps, series=asked.series,
            names=[*(factor_file(step.output.name) for step in job.plan.plan.steps), MARKER],
        ),
    ) as staged:  # fmt: skip
        results = _run(job.plan, resources, staged, stamps)
        made = Assembly(job, Limits.of(asked), record, parse_dtype(asked.dtype)).build_within(
            results
        )
        size = fill_adapter(staged, made.files)
        if asked.save_residual is not None:  # so that no output ever lacks its residual file
            made_at = staged.finished_path("") if made.files.tensor_file == "" else staged.staging
            residual = _save_residual(asked, job, made_at, identity, replaces)
        drop_factors(staged)
        staged.commit(record)
        written = open_adapter(staged.readable)
    notes = (*staged.notes, *job.plan.notes, *made.fitted.notes)
    report = written_report(
        replace(job, plan=replace(job.plan, notes=notes)), resources, made.outcomes, written,
        output_bytes=size, residual=residual, seconds=time.monotonic() - started,
    )  # fmt: skip
    wide = () if asked.dtype != "float16" else wide_factors(written)
    return replace(report, holds_whole=job.row.holds_whole, warnings=(*report.warnings, *wide))


def _prepare(asked: Extract) -> ExtractJob:
    """Check options and places, open both checkpoints, plan."""
    limit = parse_size(asked.size)
    how = FactorOptions(ranks_of(asked, limit), exact=asked.exact, slices=limit is not None)
    if asked.names not in ("v4", "v5"):
        raise UsageError("LT-226", "unknown --names", expected="v4 or v5", got=asked.names)
    program = None if asked.program is None else find_program(asked.program)
    keep, target = _kept_for(program, asked.keep), place_of(asked.output)
    row = writable(asked.to or _usual(program))
    access = access_of(asked, in_place=asked.dry_run)
    if not asked.dry_run:  # before a long download, not after it
        guard_output(target, [asked.tuned, asked.base])
        check_output(target, is_folder=row.is_folder, force=asked.force, series=asked.series)
    output_place(target, row.name)
    tuned = open_base(str(asked.tuned), [], access)
    base = open_base(str(asked.base), [], access)
    guard_output(target, [tuned.resolved.named, base.resolved.named])
    plan = _plan(asked, tuned.checkpoint, base.checkpoint, how, keep)
    made = outline(plan, base.checkpoint)
    if asked.to is None and program is not None and not program.is_of_peft:
        row = writable(program.home(_look(made)))
    loader = None if program is None or _takes_folders(program, row) else program
    try:
        _check(made, row, program, loader, Limits.of(asked))
    except MismatchError:
        changed = without_equal(made, plan)
        if len(changed.specs) == len(made.specs):
            raise
        if changed.specs:
            _check(changed, row, program, loader, Limits.of(asked))
    criteria = {
        "rank": "auto" if how.ranks.auto else asked.rank, "energy": asked.energy,
        "error": asked.error, "size": limit, "max_rank": asked.max_rank,
        "sv_ratio": asked.sv_ratio, "sv_min": asked.sv_min, "sv_base": asked.sv_base,
        "only": asked.only or None,
    }  # fmt: skip
    return ExtractJob(tuned, base, target, plan, criteria, keep, program, loader, row, access)


def _check(
    made: Adapter, row: Dialect, program: Program | None, loader: Program | None, limits: Limits
) -> None:
    """Refuse, before any work, changes that the dialect or the program has no place for."""
    if loader is not None or (program is None and is_known_by_names(row)):
        goal = Goal(row.name, limits, loader)
        kept, lost = without_misfits(made, goal)
        if kept.specs:
            refuse_lost(lost, made, row, loader)
        plan_translation(kept if kept.specs else made, goal)
    elif program is not None:
        check_fit(made, program)


def _usual(program: Program | None) -> str:
    """The dialect that a program loads where nothing is known of the model."""
    return DEFAULT if program is None or program.is_of_peft else program.homes[""]


def _takes_folders(program: Program, row: Dialect) -> bool:
    """True if the program takes one rank and one α/r of all modules of such an adapter."""
    return program.is_of_peft and row.name == DEFAULT


def _look(made: Adapter) -> Look:
    """What a loader finds of an adapter's names and shapes."""
    return Look.of_files(files_of(made, DEFAULT, {}), DEFAULT)


def _plan(
    asked: Extract, tuned: Checkpoint, base: Checkpoint, how: FactorOptions, keep: Sequence[str]
) -> ExtractPlan:
    """What is factored, in the form that both checkpoints can be brought into."""
    (tuned, of_tuned), (plain, of_base) = read_plain(tuned), read_plain(base)
    tuned_form, base_form, notes = same_form(tuned, plain, asked.rename)
    if asked.save_residual is not None and (
        of_base or base_form.tensors.keys() != base.tensors.keys() or in_layout_of(tuned, plain)
    ):
        raise MismatchError(
            "LT-427", "a residual needs a base in the form of the fine-tune", file=base.path,
            got="; ".join(notes) or "another layout", hint="leave --save-residual out",
        )  # fmt: skip
    plan = plan_extract(
        tuned_form, base_form, how=how, include=asked.include, exclude=asked.exclude, keep=keep,
        names=asked.names,
    )  # fmt: skip
    return replace(plan, notes=(*of_tuned, *of_base, *notes, *plan.notes))


def _recorded(
    asked: Extract, job: ExtractJob, resources: Resources
) -> tuple[ExtractJob, dict[str, Any]]:
    """The plan with what it is made of, and the same as provenance; {} if none is wanted."""
    options = recorded(asked, **job.criteria, exact=asked.exact, keep=job.keep)
    options["device"] = resources.run.device.type
    inputs = base_row(job.tuned, {}, role="tuned")
    inputs |= base_row(job.base, inputs)
    record = provenance_of("extract", options=options, inputs=inputs)
    plan = replace(job.plan.plan, options=record["options"], inputs=record["inputs"])
    return replace(job, plan=replace(job.plan, plan=plan)), record if asked.provenance else {}


def _save_residual(
    asked: Extract, job: ExtractJob, adapter: Path, identity: str, replaces: bool
) -> SavedResidual:
    from loratool.api.residual import save_residual

    assert asked.save_residual is not None
    return save_residual(
        Path(asked.save_residual), adapter=adapter, identity=identity,
        base=job.base.resolved.pinned or asked.base, tuned=job.tuned, access=job.access,
        run=asked.take(Run), force=replaces, provenance=asked.provenance,
    )  # fmt: skip


def _check_residual_path(asked: Extract, job: ExtractJob, identity: str) -> bool:
    """Refuse before the work what would be refused after it; True if a file may be replaced."""
    if asked.save_residual is None:
        return False
    path = Path(asked.save_residual)
    if path.suffix != ".safetensors" or job.target in (path, *path.parents):
        raise UsageError(
            "LT-235", "a residual is a .safetensors file outside of the adapter",
            got=str(path), hint="--save-residual residual.safetensors",
        )  # fmt: skip
    replaces = may_replace(path, identity, force=asked.force)
    guard_output(path, [job.tuned.resolved.named, job.base.resolved.named])
    return replaces


def _run(
    plan: ExtractPlan, resources: Resources, staged: Output, stamps: Mapping[Location, Stamp]
) -> list[Any]:
    """One result per step; modules that an earlier run finished are taken from its journal."""
    from loratool.engine.device import batch_bytes
    from loratool.engine.factor_journal import FactorJournal

    journal = FactorJournal(staged)
    grouped, positions = group_steps(plan.plan, batch_bytes(resources.run.device))
    found: dict[int, Any] = {}
    todo: list[int] = []
    for number, step in enumerate(grouped.steps):
        earlier = journal.take(step)
        if earlier is None or len(earlier) != len(positions[number]):  # another GPU's batches
            todo.append(number)
        else:
            found |= dict(zip(positions[number], earlier, strict=True))
    rest = replace(grouped, steps=tuple(grouped.steps[n] for n in todo))
    results = run_plan(rest, resources, take=journal.put, stamps=stamps)
    for number, result in zip(todo, results, strict=True):
        each = result if isinstance(result, list) else [result]
        found |= dict(zip(positions[number], each, strict=True))
    return [found[i] for i in range(len(plan.plan.steps))]


def _kept_for(program: Program | None, keep: Sequence[str]) -> Sequence[str]:
    """``--keep``, which is ``none`` for programs that load no whole tensors.

    Raises:
        UsageError: LT-272, something else was asked for.
    """
    if program is None or program.holds_whole_tensors or not program.is_of_peft:
        return keep
    if set(keep) - {"none"}:
        raise UsageError(
            "LT-272", f"{program.title} loads no tensors that are stored whole",
            expected="no --keep, or --for peft", got=list_some(keep),
        )  # fmt: skip
    return ("none",)
