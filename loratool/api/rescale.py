"""`rescale`: factor · ΔW."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.adapter import Adapter, AdapterFiles, ReadOptions, Source
from loratool.api.common import Limits, content_label, file_rules, option_values, parse_dtype
from loratool.api.detach import detach
from loratool.api.fitting import check_files, fit_for
from loratool.api.sums import assemble_sum, run_sum
from loratool.delta.forms import exchanged
from loratool.dialects import open_adapter, write_adapter_files
from loratool.dialects.programs import Program, find_program, judge_loads
from loratool.dialects.rules import is_folder
from loratool.errors import UsageError
from loratool.methods import find_method
from loratool.ops.adapter_summary import dtype_word
from loratool.ops.additive import factor_dtype, require_additive
from loratool.ops.batch import is_batch, many_outputs, name_of, place_outputs
from loratool.ops.combine import memory_needs as memory_needs_of_sum
from loratool.ops.detach import plan_detach
from loratool.ops.fitting import check_fit
from loratool.ops.input_notes import unused_warnings
from loratool.ops.inputs import Access, OpenedBase, guard_output, open_base, open_one
from loratool.ops.rescale import RescalePlan, parse_only, plan_rescale, scale_steps
from loratool.ops.sums import plan_sum
from loratool.ops.weights import Weight
from loratool.report import RescaledAdapter, RescaleReport, share_of
from loratool.store.provenance import adapter_id, checkpoint_id, provenance_of
from loratool.store.source import Resolved
from loratool.store.writer import check_output

if TYPE_CHECKING:
    from loratool.engine.rescaling import ScaledTensors


@dataclass(frozen=True)
class _Job:
    """One adapter with its plan and its place."""

    text: str
    resolved: Resolved
    plan: RescalePlan
    target: Path
    limits: Limits
    program: Program | None = None
    base: OpenedBase | None = None


def rescale(
    adapters: Sequence[str | Path],
    factor: float,
    *,
    output: str | Path,
    only: Sequence[str] = (),
    blocks: str | None = None,
    intruders: float | None = None,
    base: str | Path | None = None,
    dtype: str = "auto",
    program: str | None = None,
    alpha: float | None = None,
    threads: int | None = None,
    max_memory: str | int | None = None,
    force: bool = False,
    dry_run: bool = False,
    offline: bool = False,
    yes: bool = False,
    provenance: bool = True,
    max_header: str | int | None = None,
    allow_pickle: bool = False,
) -> RescaleReport:
    """Multiply ΔW of adapters.

    The factor goes into the configuration's alpha where every alpha stays a whole number (all
    tensors are copied byte for byte then), else into lora_B, rounded once; powers of two are
    exact either way.  With the base W + factor·(new - W) takes the place of replaced tensors, and
    DoRA, PiSSA and their kin scale too; without it the report names what stays as it is.

    Args:
        adapters: paths or Hub references.
        factor: of every module that no ``only`` matches; may be negative.
        output: folder to create; for several adapters the folder to put them into.
        only: ``REGEX=FACTOR`` on module names; the last that matches counts.
        blocks: a preset or one number per block, times ``factor``.
        intruders: λ, what the singular values of intruder dimensions of W + ΔW are multiplied
            with (PEFT's default is 0.75); needs ``base`` and factor 1; keeps the rank.
        base: what the adapter was trained on, for ``intruders`` and for what depends on it.
        dtype: of the factors; ``auto`` = as they are.
        program: ``peft``, ``vllm`` or ``llama.cpp``: written as that program loads it, with one
            rank and one α/r; None = as it is.
        alpha: lora_alpha for files without a configuration.
        threads: workers; None = twice the cores, at most 8.
        max_memory: limit for the planned peak, such as ``"2GB"``; None = what is free.
        force: replace earlier loratool outputs.
        dry_run: plan, write nothing.
        offline: never touch the network.
        yes: agree to large downloads.
        provenance: record inputs and options in the output.
        max_header: largest safetensors header accepted, such as ``"64MB"``.
        allow_pickle: convert pickles first, in a locked process.

    Raises:
        LoratoolError: see ``docs/errors.md``.

    Example:
        >>> rescale(["style"], 0.5, output="softer").adapters[0].how  # doctest: +SKIP
        'alpha'
    """
    started = time.monotonic()
    if not math.isfinite(factor):
        raise UsageError("LT-262", "not a factor", got=factor, expected="a plain decimal number")
    wanted, patterns = parse_dtype(dtype), parse_only(only)
    access = Access(offline, yes, file_rules(max_header, allow_pickle), in_place=dry_run)
    read = ReadOptions(alpha)
    texts = [str(adapter) for adapter in adapters]
    found = [open_one(text, read=read, access=access) for text in texts]
    names, dialects = [name_of(resolved) for resolved, _ in found], [a.dialect for _, a in found]
    targets = place_outputs(names, output, dialects)
    for target in targets:
        guard_output(target, [base, *(resolved.named for resolved, _ in found)])
    weak = _check_intruders(factor, intruders, base, bool(only or blocks or wanted or program))
    opened_base = None if base is None else open_base(str(base), [a for _, a in found], access)
    limits = Limits(threads, max_memory)
    reader = None if program is None else find_program(program)
    jobs = [
        _Job(
            text,
            r,
            plan_rescale(adapter, factor, only=patterns, blocks=blocks, has_base=base is not None),
            target,
            limits,
            reader,
            opened_base,
        )
        for text, (r, adapter), target in zip(texts, found, targets, strict=True)
    ]
    for job in jobs:
        job.limits.plan_steps(scale_steps(job.plan, wanted))
        if reader is not None:
            check_fit(job.plan.adapter, reader)
    if dry_run:
        rows = [_row(job, None, wanted, 0, None) for job in jobs]
    else:
        options = option_values(
            factor=factor, only=list(only), blocks=blocks, dtype=dtype, intruders=intruders,
            **{"for": program},
        )  # fmt: skip
        treated = None if opened_base is None or weak is None else (opened_base, weak)
        if treated is not None:
            from loratool.engine.device import resolve_device

            options["device"] = resolve_device("auto", is_arithmetic=True)[0].type
        with many_outputs(output, len(jobs)):
            if is_batch(output) or len(jobs) > 1:
                Path(output).mkdir(exist_ok=True)
            for job in jobs:
                as_folder = is_folder(job.plan.adapter.dialect)
                check_output(job.target, is_folder=as_folder, force=force)
            said = options if provenance else None
            rows = [_run(job, wanted, said, force, treated) for job in jobs]
    return RescaleReport(str(output), factor, tuple(rows), time.monotonic() - started, dry_run)


def _check_intruders(
    factor: float, intruders: float | None, base: str | Path | None, others: bool
) -> float | None:
    """λ, or None if intruders stay.

    Raises:
        UsageError: LT-294, LT-293, options that do not go together, or a λ out of range.
    """
    if intruders is None:
        return None
    if base is None or factor != 1 or others:
        raise UsageError(
            "LT-294", "--intruders looks at the adapter as it was trained",
            expected="FACTOR 1, --base BASE, no --only, --blocks, --dtype, --for",
        )  # fmt: skip
    if not 0 <= intruders <= 1:
        raise UsageError("LT-293", "--intruders out of range", expected="0 to 1", got=intruders)
    return intruders


def _run(
    job: _Job,
    dtype: str | None,
    options: Mapping[str, Any] | None,
    force: bool,
    treated: tuple[OpenedBase, float] | None,
) -> RescaledAdapter:
    from loratool.store.adapter_writer import write_adapter

    adapter = job.plan.adapter
    if treated is not None:
        return _mitigate(job, *treated, options, force)
    if job.plan.how == "base":
        return _with_base(job, dtype, options, force)
    if job.program is not None:
        return _fit(job, job.program, dtype, options, force)
    scaled = _scale(job, dtype)
    files = _files(job.plan, {} if scaled is None else scaled.tensors)
    record = _record(job, options)
    size = write_adapter(files, job.target, record=record, force=force, extras=adapter.extras)
    return _row(job, scaled, dtype, size, open_adapter(job.target))


def _record(job: _Job, options: Mapping[str, Any] | None) -> dict[str, Any]:
    if options is None:
        return {}
    inputs = {content_label(job.resolved, {}): adapter_id(job.plan.adapter)}
    return provenance_of("rescale", options=options, inputs=inputs)


def _fit(
    job: _Job, program: Program, dtype: str | None, options: Mapping[str, Any] | None, force: bool
) -> RescaledAdapter:
    """In the form of a program: factors go into the scalings, which become one."""
    from loratool.store.adapter_writer import write_adapter

    plan = job.plan
    cast = _scale(replace(job, plan=replace(plan, baked={})), dtype)
    adapter = plan.adapter if cast is None else _with_tensors(plan.adapter, cast.tensors)
    specs = tuple(replace(s, scaling=s.scaling * plan.factors[s.name]) for s in adapter.specs)
    fitted = fit_for(replace(adapter, specs=specs), program, job.limits)
    files = write_adapter_files(fitted.adapter)
    check_files(files, adapter, program)
    record, extras = _record(job, options), adapter.extras
    size = write_adapter(files, job.target, record=record, force=force, extras=extras)
    row = _row(job, cast, dtype, size, open_adapter(job.target))
    error = math.hypot(row.relative_error, fitted.relative_error)
    return replace(
        row, how="form", relative_error=error, notes=(*row.notes, *fitted.notes),
        warnings=(*row.warnings, *fitted.warnings),
        kept=tuple(r.name for r in fitted.adapter.replacements),
    )  # fmt: skip


def _with_base(
    job: _Job, dtype: str | None, options: Mapping[str, Any] | None, force: bool
) -> RescaledAdapter:
    """A sum of one adapter: what depends on the base is scaled with it."""
    from loratool.store.adapter_writer import write_adapter

    assert job.base is not None
    adapter, limits = job.plan.adapter, job.limits
    weight = Weight(1.0, by_name=job.plan.factors)
    detached = detach(plan_detach([(adapter, weight)], job.base.checkpoint), job.base, limits)
    plan = plan_sum(detached.adapters, verb="rescaled", base=detached.plan.replaced)
    plan = replace(plan, dtype=dtype or detached.plan.dtype, is_even=job.program is not None)
    needs, kept = memory_needs_of_sum(plan, find_method("cat"), None)
    summed = run_sum(plan, None, threads=limits.plan(needs, kept=kept).threads)
    made = detached.attach(assemble_sum(plan, summed, adapter), limits)
    fitted = fit_for(made, job.program, limits)
    files = write_adapter_files(fitted.adapter)
    check_files(files, adapter, job.program)
    record: dict[str, Any] = {}
    if options is not None:
        inputs = {content_label(job.resolved, {}): adapter_id(adapter)}
        inputs |= detached.record(inputs)
        record = provenance_of("rescale", options=options, inputs=inputs)
    size = write_adapter(files, job.target, record=record, force=force, extras=adapter.extras)
    lost = share_of(math.fsum(m.error_square for m in summed.modules),
                    math.fsum(m.square for m in summed.modules))  # fmt: skip
    row = _row(job, None, dtype, size, open_adapter(job.target))
    return replace(
        row, relative_error=math.hypot(lost, fitted.relative_error), kept=(),
        notes=(*plan.notes, *detached.plan.notes(), *fitted.notes),
        warnings=(*row.warnings, *fitted.warnings),
    )  # fmt: skip


def _mitigate(
    job: _Job, base: OpenedBase, factor: float, options: Mapping[str, Any] | None, force: bool
) -> RescaledAdapter:
    """Weaken intruder dimensions; rank, alpha and configuration stay."""
    from loratool.api.risk import mitigate
    from loratool.store.adapter_writer import write_adapter

    adapter = job.plan.adapter
    require_additive(adapter, "treated")
    found = mitigate(adapter, base, factor, job.limits)
    record: dict[str, Any] = {}
    if options is not None:
        inputs: dict[str, Any] = {content_label(job.resolved, {}): adapter_id(adapter)}
        label = content_label(base.resolved, inputs)
        inputs[label] = {"role": "base", "files": checkpoint_id(base.checkpoint)}
        record = provenance_of("rescale", options=options, inputs=inputs)
    files = _files(job.plan, found.tensors)
    size = write_adapter(files, job.target, record=record, force=force, extras=adapter.extras)
    row = _row(job, None, None, size, open_adapter(job.target))
    notes = list(row.notes)
    if found.intruders:
        notes.append(
            f"{found.modules} modules change by {found.moved:.3g} of their ΔW; their rank "
            f"cannot hold {found.relative_error:.3g} of the result"
        )
    if found.skipped:
        notes.append(f"{len(found.skipped)} modules on parts of tensors are left as they were")
    return replace(row, how="intruders", intruders=found.intruders, notes=tuple(notes),
                   relative_error=found.relative_error)  # fmt: skip


def _scale(job: _Job, dtype: str | None) -> ScaledTensors | None:
    """New tensors; None if all of them are copied."""
    plan = job.plan
    changes_type = dtype is not None and any(
        f.dtype != dtype for s in plan.adapter.specs for f in s.fields.values()
    )
    if not plan.baked and not changes_type:
        return None
    from loratool.engine.rescaling import join_scaled
    from loratool.engine.run import execute
    from loratool.store.reader import FileReader

    steps = scale_steps(plan, dtype)
    run = job.limits.run(steps)
    with FileReader() as reader:
        scaled = join_scaled(execute(steps, reader, None, run))
        if scaled.overflow:
            scaled = join_scaled(execute(scale_steps(plan, "F32"), reader, None, run))
        reader.check_unchanged()
    return scaled


def _files(plan: RescalePlan, tensors: Mapping[str, Source]) -> AdapterFiles:
    """The input's files with these tensors and this configuration instead of its own."""
    adapter = plan.adapter
    if adapter.config:
        again = write_adapter_files(adapter)
        return replace(
            again,
            tensors=tuple((key, tensors.get(source.name, source)) for key, source in again.tensors),
            json_files=dict.fromkeys(again.json_files, plan.config),
        )
    return write_adapter_files(_with_tensors(adapter, tensors))


def _with_tensors(adapter: Adapter, tensors: Mapping[str, Source]) -> Adapter:
    """The adapter in memory with some of its tensors exchanged."""
    specs = tuple(exchanged(spec, tensors) for spec in adapter.specs)
    return replace(adapter, specs=specs)


def _row(
    job: _Job, scaled: ScaledTensors | None, dtype: str | None, size: int, written: Adapter | None
) -> RescaledAdapter:
    adapter, plan = job.plan.adapter, job.plan
    counts: dict[str, int] = {}
    for spec in adapter.specs:
        text = f"{plan.factors[spec.name]:.6g}"
        counts[text] = counts.get(text, 0) + spec.is_matrix
    before = dtype or factor_dtype([adapter])
    after = before if written is None else factor_dtype([written])
    warnings = unused_warnings(adapter)
    if after != before:
        warnings.append(f"{dtype_word(before)} cannot hold the largest factor: written as float32")
    lost = 0.0 if scaled is None else share_of(scaled.error_square, scaled.square)
    return RescaledAdapter(
        source=job.text,
        output=str(job.target),
        how=plan.how,
        factors=counts,
        relative_error=lost if written is not None else math.nan,
        dtype=dtype_word(after),
        kept=tuple(r.name for r in adapter.replacements),
        output_bytes=size,
        loads_in=() if written is None else judge_loads(written),
        warnings=tuple(warnings),
        notes=plan.notes,
    )
