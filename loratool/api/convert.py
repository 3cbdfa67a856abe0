"""`convert`: the same change, as another program stores it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loratool.adapter import Adapter, AdapterFiles, ReadOptions, TensorRef
from loratool.api.common import Limits, content_label, file_rules, option_values
from loratool.dialects import open_adapter, write_adapter_files
from loratool.dialects.base import Dialect
from loratool.dialects.programs import judge_loads
from loratool.dialects.registry import writable
from loratool.ops.batch import is_batch, many_outputs, name_of, place_outputs
from loratool.ops.convert import ConvertPlan, fold_bytes, outline, plan_convert
from loratool.ops.input_notes import unused_warnings
from loratool.ops.inputs import Access, OpenedBase, guard_output, open_base, open_one
from loratool.report import ConvertedAdapter, ConvertReport, share_of
from loratool.store.adapter_writer import file_bytes, write_adapter
from loratool.store.provenance import adapter_id, checkpoint_id, provenance_of
from loratool.store.source import Resolved
from loratool.store.writer import check_output


@dataclass(frozen=True)
class _Job:
    """One adapter with its plan and its place."""

    text: str
    resolved: Resolved
    plan: ConvertPlan
    target: Path
    row: Dialect
    base: OpenedBase | None


def convert(
    adapters: Sequence[str | Path],
    *,
    to: str,
    output: str | Path,
    base: str | Path | None = None,
    skip: Sequence[str] = (),
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
) -> ConvertReport:
    """Write adapters in another dialect.

    The bytes of factors are copied; only what the other dialect has no place for is computed (a
    Tucker core goes into lora_A), and only that needs torch.  Flat names become those of the base,
    or of Stable Diffusion, SDXL and FLUX where none is given.  What the dialect cannot hold is an
    error unless ``skip`` leaves it out.

    Args:
        adapters: paths or Hub references.
        to: a dialect, such as ``peft`` or ``kohya``.
        output: folder or file to create; for several adapters the folder to put them into.
        base: what the adapters were trained on: its tensors name flat modules.
        skip: components (``te``) or regular expressions of modules to leave out.
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
        >>> convert(["a.safetensors"], to="peft", output="a").adapters[0].copied  # doctest: +SKIP
        170
    """
    started = time.monotonic()
    row = writable(to)
    access = Access(offline, yes, file_rules(max_header, allow_pickle), in_place=dry_run)
    read, texts = ReadOptions(alpha), [str(adapter) for adapter in adapters]
    found = [open_one(text, read=read, access=access) for text in texts]
    targets = place_outputs([name_of(r) for r, _ in found], output, [to] * len(found))
    for target in targets:
        guard_output(target, [base, *(resolved.named for resolved, _ in found)])
    opened = None if base is None else open_base(str(base), [a for _, a in found], access)
    checkpoint = None if opened is None else opened.checkpoint
    jobs = [
        _Job(text, resolved, plan_convert(adapter, to, base=checkpoint, skip=skip), target, row,
             opened)
        for text, (resolved, adapter), target in zip(texts, found, targets, strict=True)
    ]  # fmt: skip
    limits = Limits(threads, max_memory)
    for job in jobs:
        _workers(job.plan, limits)
    if dry_run:
        rows = [_row(job, _files(job, outline(job.plan)), 0.0) for job in jobs]
    else:
        options = option_values(to=to, skip=list(skip)) if provenance else None
        with many_outputs(output, len(jobs)):
            if is_batch(output) or len(jobs) > 1:
                Path(output).mkdir(exist_ok=True)
            for job in jobs:
                check_output(job.target, is_folder=row.is_folder, force=force)
            rows = [_run(job, options, limits, force) for job in jobs]
    return ConvertReport(str(output), to, tuple(rows), time.monotonic() - started, dry_run)


def _workers(plan: ConvertPlan, limits: Limits) -> int:
    """How many fit into memory; 1 where nothing is computed."""
    needs = fold_bytes(plan)
    return limits.plan(needs, kept=sum(needs) // 2).threads if needs else 1


def _run(
    job: _Job, options: Mapping[str, Any] | None, limits: Limits, force: bool
) -> ConvertedAdapter:
    adapter, error = _computed(job.plan, limits)
    files = _files(job, adapter)
    record: dict[str, Any] = {}
    if options is not None:
        inputs: dict[str, Any] = {content_label(job.resolved, {}): adapter_id(job.plan.source)}
        if job.base is not None:
            label = content_label(job.base.resolved, inputs)
            inputs[label] = {"role": "base", "files": checkpoint_id(job.base.checkpoint)}
        record = provenance_of("convert", options=options, inputs=inputs)
    write_adapter(files, job.target, record=record, force=force, extras=adapter.extras)
    return replace(_row(job, files, error), loads_in=judge_loads(open_adapter(job.target)))


def _computed(plan: ConvertPlan, limits: Limits) -> tuple[Adapter, float]:
    """The adapter with the factors that must be computed, and the error of storing them."""
    if not plan.computed:
        return plan.adapter, 0.0
    from loratool.engine.converting import make_factors

    names = plan.computed
    chosen = [s for s in plan.adapter.specs if s.name in names]
    folded = make_factors(chosen, names, _workers(plan, limits))
    made = {f.spec.name: f.spec for f in folded}
    specs = tuple(made.get(s.name, s) for s in plan.adapter.specs)
    error = share_of(sum(f.error_square for f in folded), sum(f.square for f in folded))
    return replace(plan.adapter, specs=specs), error


def _files(job: _Job, adapter: Adapter) -> AdapterFiles:
    files = write_adapter_files(
        adapter, job.row.name, base_config=job.base.checkpoint.config if job.base else None,
        base_tensors=job.plan.base_tensors,
    )  # fmt: skip
    if job.row.table is not None:
        return files
    said = {k: v for k, v in job.plan.source.metadata.items() if k != "loratool"}
    return replace(files, metadata={**said, **files.metadata})


def _row(job: _Job, files: AdapterFiles, error: float) -> ConvertedAdapter:
    plan = job.plan
    copied = sum(isinstance(source, TensorRef) for _, source in files.tensors)
    warnings = unused_warnings(plan.source)
    return ConvertedAdapter(
        source=job.text,
        output=str(job.target),
        dialect=plan.source.dialect,
        modules=len(plan.adapter.specs),
        copied=copied,
        computed=tuple(plan.computed),
        relative_error=error,
        left_out=plan.left_out,
        output_bytes=file_bytes(files),
        warnings=tuple(warnings),
        notes=plan.notes,
    )
