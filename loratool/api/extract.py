"""`extract`: a low-rank adapter from a full fine-tune."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.adapter import Adapter, AdapterFiles
from loratool.api.common import (
    Limits,
    Resources,
    content_label,
    file_rules,
    option_values,
    parse_size,
    plan_resources,
    recorded_name,
    run_id,
)
from loratool.api.extract_report import planned_report, written_report
from loratool.api.fitting import Fitted, check_files, fit_for
from loratool.archs.heads import is_other_head, task_of
from loratool.archs.stated import class_config
from loratool.dialects import DEFAULT, open_adapter, stated, write_adapter_files
from loratool.dialects.programs import Program, find_program
from loratool.engine.rows import args_of
from loratool.errors import MismatchError, UsageError, list_some
from loratool.ops.align import same_form
from loratool.ops.assemble import Outcome, assemble, outline, rank_groups
from loratool.ops.batch import output_place
from loratool.ops.extract import ExtractPlan, group_steps, plan_extract
from loratool.ops.fitting import check_fit
from loratool.ops.inputs import Access, OpenedBase, guard_output, open_base
from loratool.ops.rank_options import factor_options
from loratool.report import ExtractReport
from loratool.store.adapter_writer import entry_bytes, file_bytes, fill_adapter
from loratool.store.checkpoint import Checkpoint
from loratool.store.output_path import check_output
from loratool.store.provenance import checkpoint_id, provenance_of
from loratool.store.stamps import take_stamps
from loratool.store.writer import MARKER, StagedOutput

if TYPE_CHECKING:
    from loratool.engine.run import Progress
    from loratool.store.reader import Stamp


def extract(
    tuned: str | Path,
    *,
    base: str | Path,
    output: str | Path,
    rank: int | str | None = None,
    energy: float | None = None,
    error: float | None = None,
    size: str | int | None = None,
    max_rank: int | None = None,
    keep: Sequence[str] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    exact: bool = False,
    save_residual: str | Path | None = None,
    names: str = "v5",
    rename: Sequence[str] = (),
    program: str | None = None,
    device: str = "auto",
    threads: int | None = None,
    max_memory: str | int | None = None,
    force: bool = False,
    dry_run: bool = False,
    restart: bool = False,
    offline: bool = False,
    yes: bool = False,
    provenance: bool = True,
    max_header: str | int | None = None,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> ExtractReport:
    """The best low-rank approximation of tuned - base, module by module, as a PEFT adapter.

    Criteria combine: the smallest rank wins.  Without any, the rank is ``auto``.

    Args:
        tuned: the fine-tuned checkpoint.
        base: what it was tuned from.
        output: folder to create.
        rank: of every module (cut to its short side), or ``auto``: the singular values above the
            rounding noise of the fine-tune, at most 256.
        energy: share of Σσ² that every module keeps at least.
        error: relative Frobenius error that every module has at most.
        size: bytes of the weights file at most, spent where it captures the most.
        max_rank: cap.
        keep: ``embeddings``, ``all``, ``none`` or regular expressions: tensors stored whole.
            Small ones (biases, norms) are unless ``none``.
        include: regular expressions; only modules that match are factored, embeddings too.
        exclude: regular expressions of modules that are not factored.
        exact: singular vectors by a float64 eigendecomposition instead of block Lanczos.
        save_residual: file to create: with it ``merge --residual`` gives TUNED bit for bit.
        program: ``peft``, ``vllm`` or ``llama.cpp``: written as that program loads it, with one
            rank and one α/r; None = as it is.
        names: ``v5`` (names of transformers 5 in memory) or ``v4`` (names on disk).
        rename: ``s/a/b/`` expressions on the fine-tune's tensor names.
        device: ``auto``, ``cpu`` or ``cuda[:n]``.
        threads: workers; None = twice the cores, at most 8.
        max_memory: limit for the planned peak.
        force: replace an earlier loratool output.
        dry_run: plan, write nothing.
        restart: drop an interrupted run with other options.
        offline: never touch the network.
        yes: agree to large downloads.
        provenance: record inputs and options in the output.
        max_header: largest header accepted.
        allow_pickle: pickles may be opened.
        progress: called with (bytes done, bytes in all).

    Returns:
        Captured energy and error per module and in all; what was kept and left out.

    Raises:
        LoratoolError: see ``docs/errors.md``.
    """
    started = time.monotonic()
    limit = parse_size(size)
    how = factor_options(
        rank=rank, energy=energy, error=error, size=limit, max_rank=max_rank, exact=exact
    )
    if names not in ("v4", "v5"):
        raise UsageError("LT-226", "unknown --names", expected="v4 or v5", got=names)
    reader = None if program is None else find_program(program)
    keep = _kept_for(reader, keep)
    rules, target = file_rules(max_header, allow_pickle), Path(output)
    access = Access(offline, yes, rules, in_place=dry_run)
    if not dry_run:  # before a long download, not after it
        guard_output(target, [tuned, base])
        check_output(target, is_folder=True, force=force)
    output_place(output, DEFAULT)
    tuned_opened = open_base(str(tuned), [], access)
    base_opened = open_base(str(base), [], access)
    guard_output(target, [tuned_opened.resolved.path, base_opened.resolved.path])
    tuned_form, base_form, form_notes = same_form(
        tuned_opened.checkpoint, base_opened.checkpoint, rename
    )
    has_form = base_form.tensors.keys() == base_opened.checkpoint.tensors.keys()
    if save_residual is not None and not has_form:
        raise MismatchError(
            "LT-427", "a residual needs a base in the form of the fine-tune",
            file=base_opened.checkpoint.path, got="; ".join(form_notes),
            hint="leave --save-residual out",
        )  # fmt: skip
    plan = plan_extract(
        tuned_form,
        base_form,
        how=how,
        include=include,
        exclude=exclude,
        keep=keep,
        names=names,
    )
    plan = replace(plan, notes=(*form_notes, *plan.notes))
    if reader is not None:
        check_fit(outline(plan, base_opened.checkpoint), reader)
    resources = plan_resources(
        plan.plan,
        device=device,
        threads=threads,
        max_memory=max_memory,
        chunk_bytes=None,
        sample=dry_run,
        progress=progress,
    )
    asked = {
        "rank": "auto" if how.auto else rank, "energy": energy, "error": error, "size": limit,
        "max_rank": max_rank,
    }  # fmt: skip
    if dry_run:
        return planned_report(
            plan, tuned_opened, base_opened, target, asked, resources, time.monotonic() - started
        )
    options = option_values(
        **asked, exact=exact, keep=list(keep), include=list(include), exclude=list(exclude),
        names=None if names == "v5" else names, rename=list(rename),
        device=resources.run.device.type, **{"for": program},
    )  # fmt: skip
    inputs: dict[str, Any] = {}
    for role, opened in (("tuned", tuned_opened), ("base", base_opened)):
        label = content_label(opened.resolved, inputs)
        inputs[label] = {"role": role, "files": checkpoint_id(opened.checkpoint)}
    record = provenance_of("extract", options=options, inputs=inputs)
    plan = replace(
        plan, plan=replace(plan.plan, options=record["options"], inputs=record["inputs"])
    )
    identity = run_id(plan.plan, resources.device)
    if save_residual is not None:
        inputs_at = [tuned_opened.resolved.path, base_opened.resolved.path]
        replaces = _check_residual_path(Path(save_residual), target, identity, force)
        guard_output(Path(save_residual), inputs_at)
    stamps = take_stamps(plan.plan.refs())
    residual = None
    from loratool.engine.factor_journal import drop_factors, factor_file

    with StagedOutput(
        target, is_folder=True, plan_id=identity, force=force,
        restart=restart, inputs=stamps,
        names=[*(factor_file(step.output.name) for step in plan.plan.steps), MARKER],
    ) as staged:  # fmt: skip
        results = _run(plan, resources, staged, stamps)
        limits = Limits(threads, max_memory)
        assembly = _Assembly(plan, keep, base_opened, tuned_opened.checkpoint, reader, limits)
        made = assembly.build_within(results, limit)
        outcomes, files = made.outcomes, made.files
        written = fill_adapter(staged, files)
        if save_residual is not None:  # so that no output ever lacks its residual file
            from loratool.api.residual import save_residual as save

            residual = save(
                Path(save_residual), adapter=staged.staging, identity=identity,
                base=base_opened.resolved.pinned or base, tuned=tuned_opened, access=access,
                threads=threads, max_memory=max_memory, force=replaces, provenance=provenance,
                progress=progress,
            )  # fmt: skip
        drop_factors(staged)
        staged.commit(record if provenance else {})
    run_notes = tuple(staged.notes)
    plan = replace(plan, notes=(*run_notes, *plan.notes, *made.fitted.notes))
    return written_report(
        plan, outcomes, open_adapter(target), tuned_opened, base_opened, target, asked,
        resources, written, residual, time.monotonic() - started,
    )  # fmt: skip


def _check_residual_path(path: Path, target: Path, identity: str, force: bool) -> bool:
    """Refuse before the work what would be refused after it; True if a file may be replaced."""
    from loratool.store.marker import read_marker

    if path.suffix != ".safetensors" or target in (path, *path.parents):
        raise UsageError(
            "LT-235", "a residual is a .safetensors file outside of the adapter",
            got=str(path), hint="--save-residual residual.safetensors",
        )  # fmt: skip
    # A residual of this very extraction is what an interrupted run left: it is made again.
    made = read_marker(path)
    replaces = force or (made is not None and made.plan == identity)
    check_output(path, is_folder=False, force=replaces)
    return replaces


def _run(
    plan: ExtractPlan, resources: Resources, staged: StagedOutput, stamps: Mapping[Path, Stamp]
) -> list[Any]:
    """One result per step; modules that an earlier run finished are taken from its journal."""
    from loratool.engine.device import batch_bytes
    from loratool.engine.factor_journal import FactorJournal
    from loratool.engine.run import execute
    from loratool.store.reader import FileReader

    journal = FactorJournal(staged)
    grouped, positions = group_steps(plan.plan, batch_bytes(resources.run.device))
    found: dict[int, Any] = {}
    todo: list[int] = []
    for number, step in enumerate(grouped.steps):
        earlier = journal.take(step)
        if earlier is None:
            todo.append(number)
        else:
            found |= dict(zip(positions[number], earlier, strict=True))
    rest = replace(grouped, steps=tuple(grouped.steps[n] for n in todo))
    with FileReader(stamps) as reader:
        results = execute(rest, reader, None, resources.run, journal.put)
        reader.check_unchanged()
    for number, result in zip(todo, results, strict=True):
        each = result if isinstance(result, list) else [result]
        found |= dict(zip(positions[number], each, strict=True))
    return [found[i] for i in range(len(plan.plan.steps))]


def _kept_for(program: Program | None, keep: Sequence[str]) -> Sequence[str]:
    """``--keep``, which is ``none`` for programs that load no whole tensors.

    Raises:
        UsageError: LT-272, something else was asked for.
    """
    if program is None or program.holds_whole_tensors:
        return keep
    if set(keep) - {"none"}:
        raise UsageError(
            "LT-272", f"{program.title} loads no tensors that are stored whole",
            expected="no --keep, or --for peft", got=list_some(keep),
        )  # fmt: skip
    return ("none",)


@dataclass(frozen=True)
class _Made:
    """An adapter in its form, its files, and what became of every pair.

    Attributes:
        plain: its files without that form.
    """

    outcomes: list[Outcome]
    files: AdapterFiles
    fitted: Fitted
    plain: AdapterFiles


@dataclass(frozen=True)
class _Assembly:
    """Everything but the results that decides what is written."""

    plan: ExtractPlan
    keep: Sequence[str]
    base: OpenedBase
    tuned: Checkpoint
    program: Program | None
    limits: Limits

    def build(self, results: list[Any]) -> _Made:
        """The adapter of some results."""
        resolved = self.base.resolved
        label = resolved.repo_id or recorded_name(resolved.path)
        adapter, outcomes = assemble(
            self.plan, results, keep=self.keep, base=self.base.checkpoint, base_model=label
        )
        fitted = fit_for(adapter, self.program, self.limits)
        plain, files = self._files(adapter), self._files(fitted.adapter)
        check_files(files, adapter, self.program)
        if resolved.commit:  # where PEFT looks for the base's revision
            files = with_config(files, revision=resolved.commit)
        return _Made(outcomes, files, fitted, plain)

    def _files(self, adapter: Adapter) -> AdapterFiles:
        task = ""
        if any(is_other_head(r.name) for r in adapter.replacements):
            task = task_of(self.tuned.config)
        config = self.base.checkpoint.config
        pairs = (*self.plan.pairs, *self.plan.created)
        files = write_adapter_files(
            adapter, base_tensors=[n for p in pairs for n in self.plan.names_of(p)],
            base_config={**config, **class_config(task)} if task else config,
        )  # fmt: skip
        if not task or stated.task_of(files.json_files["adapter_config.json"]) is not None:
            return files
        mapping = {"base_model_class": task, "parent_library": "transformers"}
        return with_config(files, auto_mapping=mapping)

    def build_within(self, results: list[Any], limit: int | None) -> _Made:
        """The same within a number of bytes; zeros that fill up ranks count too."""
        made = self.build(results)
        plain, budget = made.plain, limit or 0
        while limit is not None and file_bytes(made.files) > limit:
            one_rank = self.program is not None
            made = self.build(_spend(self.plan, results, plain, budget, one_rank))
            budget -= max(0, file_bytes(made.files) - limit)
        return made


def with_config(files: AdapterFiles, **more: Any) -> AdapterFiles:
    """The same files with more keys in the configuration."""
    changed = {name: {**config, **more} for name, config in files.json_files.items()}
    return replace(files, json_files=changed)


def _spend(
    plan: ExtractPlan, results: list[Any], files: AdapterFiles, limit: int, one_rank: bool
) -> list[Any]:
    """Cut every module to what a size budget leaves it; ``files`` holds them uncut."""
    from loratool.engine.slicing import cut, spend

    groups = [[i for i in g if results[i].factors] for g in rank_groups(plan)]
    groups = [g for g in groups if g]
    if one_rank:
        groups = [[i for g in groups for i in g]]
    factors = sum(f.nbytes for g in groups for i in g for f in results[i].factors)
    owner = {
        id(f): number for number, g in enumerate(groups) for i in g for f in results[i].factors
    }
    shares = [0] * len(groups)
    for key, source in files.tensors:
        if id(source) in owner:
            shares[owner[id(source)]] += entry_bytes(key, source, limit)
    # kept tensors, and their part of the header: lower ranks only make the rest shorter
    fixed = file_bytes(files) - factors - sum(shares)
    ranks = spend([[results[i] for i in g] for g in groups], shares, limit - fixed)
    is_empty = not any(ranks) and len(owner) == len(files.tensors)
    if fixed > limit or is_empty:
        least = fixed + (min(shares) if is_empty else 0)
        raise UsageError(
            "LT-234", "--size is less than what is stored whole", expected=f"{least} bytes or more",
            got=limit, hint="a larger --size, or --keep none",
        )  # fmt: skip
    out = list(results)
    for group, rank in zip(groups, ranks, strict=True):
        for i in group:
            out[i] = cut(results[i], args_of(plan.plan.steps[i]), rank)
    return out
