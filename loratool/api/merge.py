"""`merge`: adapters into base weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.adapter import ReadOptions
from loratool.api.combine import combine
from loratool.api.common import (
    Resources,
    codes_option,
    file_rules,
    parse_dtype,
    parse_size,
    plan_resources,
    rounding_args,
    run_id,
)
from loratool.api.merge_job import MergeJob, NameOptions, Operation, prepare_merge
from loratool.api.open_residual import check_partner, open_residual
from loratool.api.undo import plan_undo, write_undo
from loratool.engine.grid import CPU_ELEMENTS
from loratool.engine.rows import op_of
from loratool.errors import UsageError
from loratool.ops.bind import BindOptions
from loratool.ops.combine import check_into, check_options, combination_args
from loratool.ops.consent import agree_to_read
from loratool.ops.input_notes import base_notes, input_warnings, nonfinite_warning
from loratool.ops.inputs import Access, guard_output
from loratool.ops.merge import index_files
from loratool.ops.weights import read_module_weights
from loratool.report import CombineReport, MergeReport, ModuleLoss, SubtractReport
from loratool.store.output_path import check_output

if TYPE_CHECKING:
    from loratool.engine.run import Progress
    from loratool.engine.sink import CheckpointSink


def merge(
    adapters: Sequence[str | Path],
    *,
    base: str | Path | None = None,
    into: str | None = None,
    output: str | Path,
    method: str | None = None,
    rank: int | None = None,
    params: Mapping[str, Any] | None = None,
    program: str | None = None,
    module_weights: str | Path | None = None,
    weights: Sequence[float] | None = None,
    mean: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    shard_size: str | int | None = None,
    threads: int | None = None,
    max_memory: str | int | None = None,
    chunk_bytes: int | None = None,
    exact: bool = False,
    rounding: str = "nearest",
    seed: int | None = None,
    residual: str | Path | None = None,
    untie: bool = False,
    keep_tied: bool = False,
    rename: Sequence[str] = (),
    skip: Sequence[str] = (),
    allow_unmatched: bool = False,
    resize_embeddings: bool = False,
    dequantize: bool = False,
    requant: bool = False,
    tokenizer: str | None = None,
    save_undo: str | Path | None = None,
    force: bool = False,
    dry_run: bool = False,
    restart: bool = False,
    offline: bool = False,
    yes: bool = False,
    provenance: bool = True,
    checksum: bool = False,
    alpha: float | None = None,
    rank_from: str | None = None,
    mha_out_proj: str | None = None,
    moe_layout: str | None = None,
    experts_b_order: str | None = None,
    allow_nonfinite: bool = False,
    max_header: str | int | None = None,
    allow_pickle: bool = False,
    progress: Progress | None = None,
    operation: Operation | None = None,
) -> MergeReport | CombineReport:
    """Merge adapters into base weights, or with each other if there is no base.

    With a base W' = round(W + Σ weight·ΔW), all in one pass.  Without one the result is an adapter
    whose ΔW is Σ weight·ΔW, or what ``method`` makes of them.

    Args:
        adapters: paths or Hub references, each with an optional weight (``style:0.7``).
        base: checkpoint, Hub reference, or ``auto`` for the one the adapters name;
            None = merge the adapters with each other.
        into: ``base``, or ``adapter``: with each other, ``base`` only for what depends on it
            (replaced tensors, DoRA, PiSSA and their kin); None = ``base`` if there is one.
        output: folder (or ``.safetensors`` file for a single-file base) to create.
        method: how changes are combined, a row of `loratool.methods`; None = summed.
        rank: of the resulting adapter.
        params: of the method.
        program: ``peft``, ``vllm`` or ``llama.cpp``: written as that program loads it, with one
            rank and one α/r; without a base only.
        module_weights: YAML file, regular expression -> weight of the modules that match.
        weights: coefficients in order, instead of those in the names.
        mean: divide by the number of adapters.
        device: ``auto``, ``cpu`` or ``cuda[:n]``.
        dtype: ``auto`` keeps every tensor's type; ``float32``, ``bfloat16``, ``float16`` cast.
        shard_size: largest output shard, such as ``"5GB"``; None keeps the base's shards.
        threads: workers; None = twice the cores, at most 8.
        max_memory: limit for the planned peak, such as ``"2GB"``; None = what is free.
        chunk_bytes: bytes read in one piece (never changes the result).
        exact: the correctly rounded result, the same bytes on any machine and device.
        rounding: ``nearest``, or ``stochastic``: small changes survive on average.
        seed: of stochastic rounding; None = 0.
        residual: file of ``extract --save-residual``: the result is the fine-tune, bit for bit.
        untie: give the output head weights of its own.
        keep_tied: change the shared tensor.
        rename: ``s/a/b/`` expressions on module names.
        skip: components or regular expressions to leave out.
        allow_unmatched: leave out and report what has no target.
        resize_embeddings: replaced embeddings may change the vocabulary size.
        dequantize: of a quantised base: write plain numbers, bfloat16 or ``dtype``.
        requant: of a quantised base: keep its format; changed weights are coded anew.  Refused
            where that loses more than half of the change, unless ``force``.
        tokenizer: ``base`` or ``adapter``: whose tokenizer, chat template, processor and
            generation settings go along where they differ; None = the adapter's.
        save_undo: file to write from which `subtract` gives the base back bit for bit.
        force: replace an earlier loratool output.
        dry_run: plan and predict, write nothing.
        restart: drop an interrupted run with other options.
        offline: never touch the network.
        yes: agree to large downloads.
        provenance: record inputs and options in the output.
        checksum: record the sha256 of every base file too (reads all of it once more).
        alpha: lora_alpha for files without a configuration.
        rank_from: ``file`` or ``config`` where they contradict.
        mha_out_proj: ``once`` or ``twice``; None = what the trained model computed.
        moe_layout: ``eoi`` or ``eio`` for square experts of unknown origin.
        experts_b_order: ``rank-major`` (PEFT) or ``expert-major``; None = as the configuration
            says, then rank-major.
        allow_nonfinite: let NaN and infinity of the inputs pass; they are counted.
        max_header: largest safetensors header accepted, such as ``"64MB"``.
        allow_pickle: convert pickles first, in a locked process.
        progress: called with (bytes done, bytes in all).
        operation: what `subtract` and `swap` do with the same engine.

    Returns:
        What changed, what rounding lost, what was skipped.

    Raises:
        LoratoolError: see ``docs/errors.md``.
    """
    started = time.monotonic()
    read = ReadOptions(alpha, rank_from, mha_out_proj, moe_layout, experts_b_order)
    access = Access(offline, yes, file_rules(max_header, allow_pickle), in_place=dry_run)
    if check_into(into, has_base=base is not None) == "adapter":
        check_options({
            "device": device, "shard_size": shard_size, "exact": exact, "seed": seed,
            "rounding": "auto" if rounding == "nearest" else rounding, "residual": residual,
            "untie": untie, "keep_tied": keep_tied, "rename": tuple(rename), "skip": tuple(skip),
            "allow_unmatched": allow_unmatched, "resize_embeddings": resize_embeddings,
            "dequantize": dequantize, "requant": requant,
            "save_undo": save_undo, "restart": restart, "checksum": checksum,
            "allow_nonfinite": allow_nonfinite, "tokenizer": tokenizer,
        })  # fmt: skip
        return combine(
            adapters, output=output, base=base, method=method, rank=rank, params=params,
            module_weights=module_weights, weights=weights, mean=mean, dtype=dtype,
            threads=threads, max_memory=max_memory, read=read, access=access, force=force,
            dry_run=dry_run, provenance=provenance, progress=progress, program=program,
        )  # fmt: skip
    assert base is not None
    if tokenizer not in (None, "base", "adapter"):
        raise UsageError("LT-206", "unknown --tokenizer", expected="base or adapter", got=tokenizer)
    how = combination_args(method, params, rank=rank, exact=exact, program=program)
    rules = read_module_weights(Path(module_weights), len(adapters)) if module_weights else ()
    others = [residual, module_weights, *(operation.inputs if operation else ())]
    if not dry_run:  # before a long download, not after it
        target = Path(output)
        guard_output(target, (*adapters, base, *others))
        check_output(target, is_folder=target.suffix != ".safetensors", force=force)
    names = NameOptions(
        BindOptions(
            tuple(rename), tuple(skip), allow_unmatched, untie, keep_tied,
            resize_embeddings, moe_layout,
        ),
        read,
        codes_option(dequantize, requant, dtype=dtype, rounding=rounding, exact=exact),
    )  # fmt: skip
    rest = None
    if residual is not None:
        rest, names = open_residual(residual, adapters, names, dtype, rounding)
    job = prepare_merge(
        adapters,
        base=base,
        weights=weights,
        mean=mean,
        names=names,
        access=access,
        module_weights=rules,
        dtype=parse_dtype(dtype),
        shard_bytes=parse_size(shard_size),
        output=Path(output),
        with_provenance=provenance,
        rounding={**rounding_args(exact or rest is not None, rounding, seed), **how},
        operation=operation,
        checksum=checksum,
        residual=rest,
        tokenizer=tokenizer,
    )
    if rest is not None:
        check_partner(rest, job.adapters[0])
        job = replace(job, block_elements=CPU_ELEMENTS)
    resources_for = partial(
        plan_resources,
        block_elements=job.block_elements,
        device=device,
        threads=threads,
        max_memory=max_memory,
        chunk_bytes=chunk_bytes,
        sample=dry_run,
        progress=progress,
        allow_nonfinite=allow_nonfinite,
    )
    resources = resources_for(job.merge.plan)
    undo, before_commit, peak = None, None, resources.memory.peak_bytes
    if save_undo is not None:
        identity = run_id(job.merge.plan, resources.device)
        guard_output(Path(save_undo), others)
        undo = plan_undo(job, Path(save_undo), identity, dtype=dtype, force=force)
        patching = resources_for(undo.plan)
        before_commit = partial(write_undo, job, undo, patching)
        peak = max(peak, patching.memory.peak_bytes)
    run_notes: list[str] = []
    if dry_run:
        from loratool.engine.reads import planned_ranges

        block = resources.run.elements
        agree_to_read(planned_ranges(job.merge.plan, elements=block, sample=True), yes=yes)
        results = _predict(job, resources)
    else:
        results, run_notes = _write(job, resources, before_commit, force=force, restart=restart)
    report = _report(job, resources, results, run_notes, dry_run=dry_run, started=started)
    if undo is None:
        return report
    size = 0 if dry_run else undo.path.stat().st_size
    return replace(report, undo=str(undo.path), undo_bytes=size, peak_memory_bytes=peak)


def _predict(job: MergeJob, resources: Resources) -> list[Any]:
    from loratool.engine.run import execute
    from loratool.store.reader import FileReader

    with FileReader() as reader:
        return execute(job.merge.plan, reader, None, resources.run)


def _write(
    job: MergeJob,
    resources: Resources,
    before_commit: Callable[[CheckpointSink], None] | None,
    *,
    force: bool,
    restart: bool,
) -> tuple[list[Any], list[str]]:
    """Write the output; returns the steps' results and notes about an interrupted run."""
    from loratool.engine.run import execute
    from loratool.engine.sink import CheckpointSink
    from loratool.ops.loss import require_kept
    from loratool.store.jsonfile import dump_json
    from loratool.store.reader import FileReader
    from loratool.store.stamps import take_stamps
    from loratool.store.writer import MARKER, StagedOutput

    assert job.output is not None
    plan = job.merge.plan
    is_folder = job.base.checkpoint.is_folder
    stamps = take_stamps(plan.refs())
    indices = index_files(plan, job.checkpoint) if is_folder else {}
    names = [*(s.name for s in plan.shards), *(s.name for s in job.sidecars), *indices]
    output = StagedOutput(
        job.output,
        is_folder=is_folder,
        plan_id=run_id(plan, resources.device),
        names=[*names, MARKER] if is_folder else names,
        force=force,
        restart=restart,
        inputs=stamps,
        need_bytes=plan.output_bytes + sum(s.nbytes for s in job.sidecars),
    )
    with output, FileReader(stamps) as reader:
        sink = CheckpointSink(plan, output)
        results = execute(plan, reader, sink, resources.run)
        reader.check_unchanged()
        if any(op_of(s).writes_codes for s in plan.steps) and not force:
            changed = [r for r in map(plain_result, results) if r.get("delta_square", 0) > 0]
            require_kept(changed, {s.output.name: s.output.numel for s in plan.steps})
        if before_commit is not None:  # so that no output ever lacks its undo file
            before_commit(sink)
        if is_folder:
            for sidecar in job.sidecars:
                sidecar.write_to(output)
            for name, index in indices.items():
                output.write_file(name, dump_json(index))
        record = {**job.record, "device": resources.device.partition(":")[0]}
        output.commit(record if job.record else {})
    return results, output.notes


def _report(
    job: MergeJob,
    resources: Resources,
    results: Sequence[Any],
    run_notes: Sequence[str],
    *,
    dry_run: bool,
    started: float,
) -> MergeReport:
    from loratool.ops.loss import WARN_LOSS, module_losses

    plan = job.merge.plan
    sizes = {s.output.name: s.output.numel for s in plan.steps}
    results = [plain_result(r) for r in results]
    sums = [r for r in results if "delta_square" in r]
    summed = [r for r in sums if r["delta_square"] > 0]
    modules, total = module_losses(summed, sizes)
    loss = total.predicted_loss if dry_run else total.loss
    warnings = list(job.warnings)
    if loss > WARN_LOSS:
        warnings.append(_loss_warning(total, modules, dry_run))
    if not summed and not job.created and len(job.merge.changed) <= len(sums):
        warnings.append("nothing changes: every weight or change is 0, or they cancel")
    warnings += [*input_warnings(job.adapters), *nonfinite_warning(sums)]
    notes = [
        *run_notes,
        *base_notes(() if job.operation.signs else job.adapters, job.base),
        *job.merge.notes,
        *job.sidecar_notes,
        *_cast_note(sums),
        *_exact_note(sums),
    ]
    checked = sum(op_of(s).is_proven for s in plan.steps)
    if checked:
        notes.append(f"{checked} tensors are the fine-tune's, bit for bit (checked)")
    if job.base.resolved.note:
        notes.insert(0, job.base.resolved.note)
    whose = {s.name: s.origin for s in job.sidecars}
    tokenizer = next((whose[n] for n in ("tokenizer.json", "tokenizer_config.json") if n in whose),
                     None)  # fmt: skip
    extra: dict[str, Any] = _restored(results) if job.operation.report is SubtractReport else {}
    return job.operation.report(
        output=str(job.output),
        adapters=tuple({"label": a.resolved.label, **a.weight.to_json()} for a in job.adapters),
        base=str(job.base.resolved.named),
        base_label=job.base.resolved.label,
        changed=len(job.merge.changed),
        copied=len({*job.merge.copied} - {*job.created}),
        cast=len({*job.merge.cast} - {*job.created}),
        created=len({*job.created, *(n for b in job.bound for n in b.bindings.new_tensors)}),
        skipped=tuple(sorted({n for b in job.bound for n in b.bindings.skipped})),
        rule=", ".join(dict.fromkeys(b.bindings.rule for b in job.bound)),
        device=resources.device,
        device_reason=resources.reason,
        dtype=total.dtype,
        shards=len(plan.shards),
        output_bytes=plan.output_bytes,
        peak_memory_bytes=resources.memory.peak_bytes,
        seconds=time.monotonic() - started,
        modules=tuple(modules),
        total=total,
        warnings=tuple(warnings),
        notes=tuple(dict.fromkeys(notes)),
        sidecars=tuple(s.name for s in job.sidecars),
        tokenizer=tokenizer,
        dry_run=dry_run,
        plan=plan.to_json() if dry_run else None,
        **extra,
    )  # fmt: skip


def plain_result(result: Any) -> dict[str, Any]:
    """A kernel's result as the journal has it."""
    return result if isinstance(result, dict) else dict(vars(result))


def _restored(results: Sequence[dict[str, Any]]) -> dict[str, int]:
    counts = [r["count"] for r in results if "count" in r]
    return {"restored": len(counts), "corrected": sum(counts)}


def _loss_warning(total: ModuleLoss, modules: Sequence[ModuleLoss], dry_run: bool) -> str:
    def lost(m: ModuleLoss) -> float:
        return m.predicted_loss if dry_run else m.loss

    worst = max(modules, key=lost)
    return (
        f"rounding to {total.dtype} loses {lost(total):.0%} of the change "
        f"(worst {worst.name} {lost(worst):.0%}): --dtype float32 keeps it"
    )


def _cast_note(results: Sequence[dict[str, Any]]) -> list[str]:
    cast = [r for r in results if r["delta_square"] == 0 and r["error_square"] > 0]
    weight = sum(r["weight_square"] for r in cast)
    error = sum(r["error_square"] for r in cast)
    if not weight:
        return []
    return [f"the cast of {len(cast)} other tensors moves them by {(error / weight) ** 0.5:.1e}"]


def _exact_note(results: Sequence[dict[str, Any]]) -> list[str]:
    count = sum(r["settled"] for r in results)
    return [f"{count:,} elements needed exact sums"] if count else []
