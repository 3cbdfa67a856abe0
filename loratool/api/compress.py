"""`compress`: fewer ranks for adapters, the best ones."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.adapter import Adapter, AdapterFiles, ReadOptions
from loratool.api.common import (
    Limits,
    Resources,
    content_label,
    file_rules,
    option_values,
    parse_size,
    plan_resources,
)
from loratool.api.compress_ranks import choose_ranks
from loratool.api.detach import Detached, detach
from loratool.api.fitting import check_files, fit_for
from loratool.dialects import open_adapter, write_adapter_files
from loratool.dialects.programs import Program, find_program, judge_loads
from loratool.dialects.rules import is_folder
from loratool.errors import UsageError
from loratool.ops.batch import is_batch, many_outputs, name_of, place_outputs
from loratool.ops.compress import CompressPlan, names_of, plan_compress, rebuild
from loratool.ops.compress_options import rank_rule
from loratool.ops.detach import plan_detach
from loratool.ops.fitting import check_fit
from loratool.ops.input_notes import unused_warnings
from loratool.ops.inputs import Access, OpenedBase, guard_output, open_base, open_one
from loratool.ops.weights import Weight
from loratool.report import (
    CompressedAdapter,
    CompressedModule,
    CompressReport,
    energy_and_error,
)
from loratool.store.adapter_writer import file_bytes
from loratool.store.provenance import adapter_id, checkpoint_id, provenance_of
from loratool.store.source import Resolved
from loratool.store.writer import check_output

if TYPE_CHECKING:
    from loratool.engine.compressing import Factored
    from loratool.engine.run import Progress


def compress(
    adapters: str | Path | Sequence[str | Path],
    *,
    output: str | Path,
    rank: int | str | None = None,
    base: str | Path | None = None,
    energy: float | None = None,
    error: float | None = None,
    size: str | int | None = None,
    sv_ratio: float | None = None,
    max_rank: int | None = None,
    program: str | None = None,
    threads: int | None = None,
    max_memory: str | int | None = None,
    force: bool = False,
    dry_run: bool = False,
    offline: bool = False,
    yes: bool = False,
    provenance: bool = True,
    max_header: str | int | None = None,
    allow_pickle: bool = False,
    read: ReadOptions | None = None,
    progress: Progress | None = None,
) -> CompressReport:
    """Truncate the SVD of every delta of one or more adapters; ΔW is never formed.

    Changes that depend on the base are compressed with it: PiSSA and its kin become LoRA, DoRA
    stays DoRA, its rows' lengths set anew.  Criteria combine: the smallest rank wins.  A module
    never gets larger: where fewer ranks would not save bytes its factors are copied.

    Args:
        adapters: one, or several that keep their names inside of ``output``.
        output: folder to create; for several adapters the folder that holds theirs.
        rank: of every module; ``auto``: what a merge into ``base`` can resolve.
        base: checkpoint for ``auto``, where singular values below the rounding noise of a merge
            go, and for changes that depend on it.
        energy: least rank that keeps this share of Σσ², per module.
        error: least rank with at most this relative error, per module.
        size: whole tensor file at most, in bytes or as ``20MB``, spent where it keeps most.
        sv_ratio: keep σ ≥ σ₁ / sv_ratio, per module.
        max_rank: cap for all criteria.
        program: ``peft``, ``vllm`` or ``llama.cpp``: written as that program loads it, with one
            rank and one α/r; None = as it is.
        threads: workers; None = twice the cores, at most 8.
        max_memory: limit for the planned peak.
        force: replace earlier loratool outputs.
        dry_run: compute everything, write nothing.
        offline: never touch the network.
        yes: agree to large downloads.
        provenance: record inputs and options in the output.
        max_header: largest safetensors header accepted, such as ``"64MB"``.
        allow_pickle: convert pickles first, in a locked process.
        read: what the files do not say.
        progress: called with (bytes done, bytes in all).

    Returns:
        Ranks, energy and error per module and in all, as stored.

    Raises:
        LoratoolError: see ``docs/errors.md``.

    Example:
        >>> lt.compress("r64", output="r16", energy=0.99, max_rank=16)  # doctest: +SKIP
    """
    started = time.monotonic()
    limit = parse_size(size)
    rule = rank_rule(
        rank=rank,
        energy=energy,
        error=error,
        sv_ratio=sv_ratio,
        max_rank=max_rank,
        size=limit,
        has_base=base is not None,
    )
    target = None if program is None else find_program(program)
    options = option_values(**rule, size=limit, rank_auto=rank == "auto", **{"for": program})
    read = read or ReadOptions()
    access = Access(offline, yes, file_rules(max_header, allow_pickle))
    texts = [str(a) for a in ([adapters] if isinstance(adapters, (str, Path)) else adapters)]
    if not texts:
        raise UsageError("LT-221", "no adapter given")
    with nullcontext() if dry_run else many_outputs(output, len(texts)):
        limits = Limits(threads, max_memory)
        jobs = _open(texts, base, output, read, access, force, target, limits)
        if base is not None and rank == "auto":
            jobs = _cap_all(jobs, base, read, access, threads, max_memory)
        if (len(jobs) > 1 or is_batch(output)) and not dry_run:
            Path(output).mkdir(exist_ok=True)
        advance = _advance_of(jobs, progress)
        reports: list[CompressedAdapter] = []
        warnings: list[str] = []
        for job in jobs:
            resources = plan_resources(
                job.plan.steps("factor", [{"rule": rule}] * len(job.plan.specs)), device="cpu",
                threads=threads, max_memory=max_memory, chunk_bytes=None, sample=False,
                progress=None,
            )  # fmt: skip
            made = _within(job, rule, limit, resources, advance, target, limits)
            warnings += made.warnings
            if not dry_run:
                _write(job, made.files, _record(job, options) if provenance else {}, force)
            reports.append(_report(job, made, dry_run))
    warnings += [f"{j.resolved.label}: {w}" for j in jobs for w in unused_warnings(j.source)]
    seconds = time.monotonic() - started
    return CompressReport(tuple(reports), options, seconds, dry_run, tuple(warnings))


def _advance_of(jobs: Sequence[_Job], progress: Progress | None) -> Callable[[int], None]:
    """Counts the bytes of finished adapters."""
    total = sum(s.nbytes for j in jobs for spec in j.plan.specs for s in spec.fields.values())
    done = 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(min(done, total), max(1, total))

    return advance


def _record(job: _Job, options: Mapping[str, Any]) -> dict[str, Any]:
    inputs = {content_label(job.resolved, job.base): adapter_id(job.source)}
    if job.detached is not None and not job.base:
        inputs |= job.detached.record(inputs)
    return provenance_of("compress", options=options, inputs={**inputs, **job.base})


@dataclass(frozen=True)
class _Job:
    """One adapter on its way."""

    resolved: Resolved
    source: Adapter
    plan: CompressPlan
    target: Path
    detached: Detached | None = None
    caps: Sequence[int | None] | None = None
    """Noise rank of each spec, None where it has none; None without ``--rank auto``."""
    base: Mapping[str, Any] = field(default_factory=dict)
    """The base of ``--rank auto`` by name and content, as provenance records it."""

    @property
    def original(self) -> AdapterFiles:
        """The input as it would be written again."""
        return write_adapter_files(self.source)


@dataclass(frozen=True)
class _Made:
    """What became of one adapter."""

    files: AdapterFiles
    results: Sequence[Factored]
    adapter: Adapter
    dropped: Sequence[str]
    is_unchanged: bool
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def _open(
    texts: Sequence[str],
    base: str | Path | None,
    output: str | Path,
    read: ReadOptions,
    access: Access,
    force: bool,
    program: Program | None,
    limits: Limits,
) -> list[_Job]:
    """Open every input and check every output before any work is done."""
    found = [open_one(text, read=read, access=access) for text in texts]
    names, dialects = [name_of(one) for one, _ in found], [a.dialect for _, a in found]
    targets = place_outputs(names, output, dialects)
    for (_, adapter), target in zip(found, targets, strict=True):
        guard_output(target, [base, *(one.named for one, _ in found)])
        if target == Path(output) or target.parent.exists():
            check_output(target, is_folder=is_folder(adapter.dialect), force=force)
        if program is not None:
            check_fit(adapter, program)
    opened = None
    if base is not None and not all(s.is_additive for _, a in found for s in a.specs):
        opened = open_base(str(base), [a for _, a in found], access)
    jobs: list[_Job] = []
    for (resolved, adapter), target in zip(found, targets, strict=True):
        detached = None if opened is None else _detach(adapter, opened, limits)
        plain = adapter if detached is None else detached.adapters[0][0]
        plan = plan_compress(
            plain, one_rank=program is not None, original=adapter,
            turned=frozenset() if detached is None else detached.plan.turned,
        )  # fmt: skip
        jobs.append(_Job(resolved, adapter, plan, target, detached))
    return jobs


def _detach(adapter: Adapter, base: OpenedBase, limits: Limits) -> Detached | None:
    """The adapter without its base; None if no change depends on it."""
    if all(spec.is_additive for spec in adapter.specs):
        return None
    return detach(plan_detach([(adapter, Weight())], base.checkpoint), base, limits)


def _cap_all(
    jobs: Sequence[_Job],
    base: str | Path,
    read: ReadOptions,
    access: Access,
    threads: int | None,
    max_memory: str | int | None,
) -> list[_Job]:
    """`_capped_by_noise` for every adapter, by one commit of the base that was named."""
    capped: list[_Job] = []
    for job in jobs:
        capped.append(_capped_by_noise(job, base, read, access, threads, max_memory))
        name = capped[-1].base["base"]["name"]
        if name.startswith("hf://") and str(base) != "auto":
            base = name
    return capped


def _capped_by_noise(
    job: _Job,
    base: str | Path,
    read: ReadOptions,
    access: Access,
    threads: int | None,
    max_memory: str | int | None,
) -> _Job:
    """With what a merge into the base can resolve as the largest rank of each spec."""
    from loratool.api.look import look_at_base

    found, opened = look_at_base(
        job.resolved.path, base, read=read, access=access, device="cpu", threads=threads,
        max_memory=max_memory,
    )  # fmt: skip
    ranks = {m.name: m.noise_rank for m in found.modules}
    known = [ranks.get(spec.name) for spec in job.plan.specs]
    label = content_label(opened.resolved, {})
    return replace(
        job, caps=[None if rank is None else int(rank) for rank in known],
        base={"base": {"name": label, "files": checkpoint_id(opened.checkpoint)}},
    )  # fmt: skip


def _within(
    job: _Job,
    rule: dict[str, Any],
    limit: int | None,
    resources: Resources,
    advance: Callable[[int], None],
    program: Program | None,
    limits: Limits,
) -> _Made:
    """New factors in the form of a program; zeros that fill up ranks count for the limit too."""
    made = _compress(job, rule, limit, resources, advance, limits)
    if program is None:
        return made
    made, budget = _fitted(job, made, program, limits), limit
    while limit is not None and budget is not None and (over := file_bytes(made.files) - limit) > 0:
        budget -= over
        made = _compress(job, rule, budget, resources, lambda _: None, limits)
        made = _fitted(job, made, program, limits)
    return made


def _fitted(job: _Job, made: _Made, program: Program, limits: Limits) -> _Made:
    fitted = fit_for(made.adapter, program, limits)
    files = write_adapter_files(fitted.adapter, base_tensors=names_of(job.plan.adapter))
    check_files(files, made.adapter, program)
    is_unchanged = made.is_unchanged and fitted.adapter is job.source
    return replace(made, files=files, adapter=fitted.adapter, is_unchanged=is_unchanged,
                   notes=fitted.notes, warnings=fitted.warnings)  # fmt: skip


def _compress(
    job: _Job,
    rule: dict[str, Any],
    limit: int | None,
    resources: Resources,
    advance: Callable[[int], None],
    limits: Limits,
) -> _Made:
    """New factors for every module, within the limit if there is one."""
    from loratool.engine.tying import tie_factors

    plan = job.plan
    dtypes = list(plan.dtypes)
    original = job.original
    before = file_bytes(original)
    spectra = None
    if plan.is_grouped or limit is not None:
        spectra = _run(plan, "spectrum", [{}] * len(plan.specs), resources)
    while True:
        args = [plan.factor_args(i) | {"rule": rule, "dtype": d} for i, d in enumerate(dtypes)]
        for i, cap in enumerate(job.caps or ()):
            args[i]["cap"] = cap
        if spectra is not None:
            ranks = choose_ranks(plan, spectra, rule, limit, dtypes, job.caps)
            for group in plan.groups:
                for i in group.specs:
                    args[i] |= {"rank": ranks[i], "is_free": len(group.specs) == 1}
        results = _run(plan, "factor", args, resources)
        if spectra is None and not any(r.rank for r in results):
            spectra = _run(plan, "spectrum", [{}] * len(plan.specs), resources)
            continue  # all are zero, and PEFT needs one module at least
        widened = [i for i, r in enumerate(results) if r.is_widened and dtypes[i] != "F32"]
        if limit is None or not widened:
            break
        for i in widened:  # their factors cost more: share the budget out again
            dtypes[i] = "F32"
    advance(sum(s.nbytes for spec in plan.specs for s in spec.fields.values()))
    adapter, dropped = rebuild(plan, results)
    if adapter is plan.adapter:
        return _Made(original, results, job.source, [], True)
    adapter = tie_factors(adapter)
    if job.detached is not None:
        adapter = job.detached.attach(adapter, limits)
    files = write_adapter_files(adapter, base_tensors=names_of(plan.adapter))
    if file_bytes(files) >= before:  # such as block-diagonal factors that had to be written out
        return _Made(original, _copied(plan, results), job.source, [], True)
    return _Made(files, results, adapter, dropped, False)


def _run(
    plan: CompressPlan, op: str, args: Sequence[dict[str, Any]], resources: Resources
) -> list[Any]:
    from loratool.engine.run import execute
    from loratool.store.reader import FileReader

    with FileReader() as reader:
        results = execute(plan.steps(op, args), reader, None, resources.run)
        reader.check_unchanged()
    return results


def _copied(plan: CompressPlan, results: Sequence[Factored]) -> list[Factored]:
    return [
        replace(r, rank=s.rank, kept_square=r.square, residual_square=0.0, factors=None)
        for s, r in zip(plan.specs, results, strict=True)
    ]


def _write(job: _Job, files: AdapterFiles, record: dict[str, Any], force: bool) -> None:
    """The adapter's files, with tokenizer and licence beside them."""
    from loratool.store.adapter_writer import write_adapter

    extras = job.source.extras
    write_adapter(files, job.target, record=record, extras=extras, force=force)


def _report(job: _Job, made: _Made, dry_run: bool) -> CompressedAdapter:
    modules = tuple(
        CompressedModule(
            name=spec.name,
            family=_family(spec.name, spec.layout),
            rank_before=spec.product_rank,
            rank=result.rank,
            norm=math.sqrt(result.square),
            captured_energy=result.kept_square / result.square if result.square else 1.0,
            relative_error=math.sqrt(result.residual_square / result.square)
            if result.square
            else 0.0,
            is_copied=result.factors is None and result.rank > 0,
        )
        for spec, result in zip(job.plan.specs, made.results, strict=True)
    )
    energy, error = energy_and_error(modules)
    notes = list(job.source.notes)
    if job.detached is not None and not made.is_unchanged:
        notes += job.detached.plan.notes()
    if job.caps is not None:
        without = sum(cap is None for cap in job.caps)
        notes.append(
            "rank auto: singular values above the rounding noise of a merge into the base"
            + (f"; {without} modules have no such rank" if without else "")
        )
    notes += made.notes
    if job.resolved.note:
        notes.insert(0, job.resolved.note)
    if job.source.unclaimed and not made.is_unchanged:
        notes.append(f"{len(job.source.unclaimed)} tensors that nothing uses are left out")
    written = made.adapter if dry_run else open_adapter(job.target)
    return CompressedAdapter(
        source=job.resolved.label,
        output=str(job.target),
        modules=modules,
        bytes_before=file_bytes(job.original),
        bytes_after=file_bytes(made.files),
        captured_energy=energy,
        relative_error=error,
        dropped=tuple(made.dropped),
        widened=tuple(
            s.name for s, r in zip(job.plan.specs, made.results, strict=True) if r.is_widened
        ),
        is_unchanged=made.is_unchanged,
        loads_in=judge_loads(written),
        notes=tuple(notes),
    )


def _family(name: str, layout: str) -> str:
    parts = name.split(".")
    return parts[-1] if layout == "experts" or len(parts) < 2 else parts[-2]
