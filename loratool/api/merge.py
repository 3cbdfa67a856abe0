"""`merge`: adapters into base weights."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.adapter import ReadOptions
from loratool.api.common import (
    Resources,
    content_label,
    option_values,
    parse_dtype,
    parse_size,
    plan_resources,
)
from loratool.dtypes import DTYPES
from loratool.errors import MismatchError, UsageError
from loratool.ops.bind import BindOptions, bind
from loratool.ops.inputs import (
    Access,
    OpenedAdapter,
    OpenedBase,
    guard_output,
    open_adapters,
    open_base,
)
from loratool.ops.merge import MergePlan, WeightedAdapter, index_files, plan_merge
from loratool.report import MergeReport, ModuleLoss
from loratool.store.checkpoint import Checkpoint
from loratool.store.provenance import adapter_id, checkpoint_id, provenance_of

if TYPE_CHECKING:
    from loratool.engine.run import Progress
    from loratool.store.sidecar import Sidecar


def merge(
    adapters: Sequence[str],
    *,
    base: str | Path,
    output: str | Path,
    weights: Sequence[float] | None = None,
    mean: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    shard_size: str | int | None = None,
    threads: int | None = None,
    max_memory: str | int | None = None,
    chunk_bytes: int | None = None,
    untie: bool = False,
    keep_tied: bool = False,
    rename: Sequence[str] = (),
    skip: Sequence[str] = (),
    allow_unmatched: bool = False,
    resize_embeddings: bool = False,
    force: bool = False,
    dry_run: bool = False,
    restart: bool = False,
    offline: bool = False,
    yes: bool = False,
    provenance: bool = True,
    alpha: float | None = None,
    rank_from: str | None = None,
    mha_out_proj: str | None = None,
    moe_layout: str | None = None,
    experts_b_order: str = "rank-major",
    progress: Progress | None = None,
) -> MergeReport:
    """Merge adapters into base weights: W' = round(W + Σ weight·ΔW), all in one pass.

    Args:
        adapters: paths or Hub references, each with an optional weight (``style:0.7``).
        base: checkpoint, Hub reference, or ``auto`` for the one the adapters name.
        output: folder (or ``.safetensors`` file for a single-file base) to create.
        weights: coefficients in order, instead of those in the names.
        mean: divide by the number of adapters.
        device: ``auto``, ``cpu`` or ``cuda[:n]``.
        dtype: ``auto`` keeps every tensor's type; ``float32``, ``bfloat16``, ``float16`` cast.
        shard_size: largest output shard, such as ``"5GB"``; None keeps the base's shards.
        threads: workers; None = twice the cores, at most 8.
        max_memory: limit for the planned peak, such as ``"2GB"``; None = what is free.
        chunk_bytes: bytes read in one piece (never changes the result).
        untie: give the output head weights of its own.
        keep_tied: change the shared tensor.
        rename: ``s/a/b/`` expressions on module names.
        skip: components or regular expressions to leave out.
        allow_unmatched: leave out and report what has no target.
        resize_embeddings: replaced embeddings may change the vocabulary size.
        force: replace an earlier loratool output.
        dry_run: plan and predict, write nothing.
        restart: drop an interrupted run with other options.
        offline: never touch the network.
        yes: agree to large downloads.
        provenance: record inputs and options in the output.
        alpha: lora_alpha for files without a configuration.
        rank_from: ``file`` or ``config`` where they contradict.
        mha_out_proj: ``once`` or ``twice``; None = what the trained model computed.
        moe_layout: ``eoi`` or ``eio`` for square experts of unknown origin.
        experts_b_order: ``rank-major`` (PEFT) or ``expert-major``.
        progress: called with (bytes done, bytes in all).

    Returns:
        What changed, what rounding lost, what was skipped.

    Raises:
        LoratoolError: see ``docs/errors.md``.
    """
    started = time.monotonic()
    names = NameOptions(
        BindOptions(
            tuple(rename), tuple(skip), allow_unmatched, untie, keep_tied,
            resize_embeddings, moe_layout,
        ),
        ReadOptions(alpha, rank_from, mha_out_proj, moe_layout, experts_b_order),
    )  # fmt: skip
    job = prepare_merge(
        adapters,
        base=base,
        weights=weights,
        mean=mean,
        names=names,
        access=Access(offline, yes),
        dtype=parse_dtype(dtype),
        shard_bytes=parse_size(shard_size),
        output=Path(output),
        with_provenance=provenance,
    )
    resources = plan_resources(
        job.merge.plan,
        device=device,
        threads=threads,
        max_memory=max_memory,
        chunk_bytes=chunk_bytes,
        sample=dry_run,
        progress=progress,
    )
    results = _predict(job, resources) if dry_run else _write(job, resources, force, restart)
    return _report(job, resources, results, dry_run=dry_run, started=started)


@dataclass(frozen=True)
class NameOptions:
    """How names and missing facts of adapters are understood."""

    bind: BindOptions
    read: ReadOptions


@dataclass(frozen=True)
class MergeJob:
    """Everything known before the first tensor byte is read.

    Attributes:
        adapters: as opened.
        base: as opened.
        checkpoint: the base that the plan reads (virtual where layers are replicated).
        merge: the plan.
        bound: adapters with their bindings.
        sidecars: small files of the output.
        sidecar_notes: one sentence each.
        record: provenance; empty if it is not wanted.
        output: final place; None for verification.
    """

    adapters: tuple[OpenedAdapter, ...]
    base: OpenedBase
    checkpoint: Checkpoint
    merge: MergePlan
    bound: tuple[WeightedAdapter, ...]
    sidecars: tuple[Sidecar, ...]
    sidecar_notes: tuple[str, ...]
    record: dict[str, Any]
    output: Path | None


def prepare_merge(
    texts: Sequence[str],
    *,
    base: str | Path,
    weights: Sequence[float] | None,
    mean: bool,
    names: NameOptions,
    access: Access,
    dtype: str | None,
    shard_bytes: int | None,
    output: Path | None,
    with_provenance: bool,
) -> MergeJob:
    """Open, bind and plan; nothing is written."""
    opened = open_adapters(texts, weights=weights, mean=mean, read=names.read, access=access)
    opened_base = open_base(str(base), opened, access)
    if output is not None:
        _check_output_form(output, opened_base)
        guard_output(output, [opened_base.resolved.path, *(a.resolved.path for a in opened)])
    bound = tuple(
        WeightedAdapter(o.adapter, o.weight, bind(o.adapter, opened_base.checkpoint, names.bind))
        for o in opened
    )
    checkpoint = _one_checkpoint(bound, opened_base.checkpoint)
    record = _record(opened, opened_base, names, dtype, shard_bytes) if with_provenance else {}
    metadata = None
    if not opened_base.checkpoint.is_folder and record:
        metadata = {"loratool": json.dumps(record, sort_keys=True)}
    planned = plan_merge(
        bound, checkpoint, dtype=dtype, shard_bytes=shard_bytes, file_metadata=metadata
    )
    sidecars, notes = _sidecars(opened, opened_base.checkpoint, planned)
    plan = replace(planned.plan, options=record.get("options", {}), inputs=record.get("inputs", {}))
    if output is not None and not opened_base.checkpoint.is_folder:
        shards = (replace(plan.shards[0], name=output.name),)
        plan = replace(plan, shards=shards)
    return MergeJob(
        tuple(opened),
        opened_base,
        checkpoint,
        replace(planned, plan=plan),
        bound,
        tuple(sidecars),
        tuple(notes),
        record,
        output,
    )


def _check_output_form(output: Path, base: OpenedBase) -> None:
    is_file = output.suffix == ".safetensors"
    if is_file == base.checkpoint.is_folder:
        want = "a folder" if base.checkpoint.is_folder else "a .safetensors file"
        raise UsageError(
            "LT-225", "the output has the form of the base", expected=want, got=str(output)
        )


def _one_checkpoint(bound: Sequence[WeightedAdapter], base: Checkpoint) -> Checkpoint:
    orders = {b.adapter.layer_order for b in bound}
    if len(orders) > 1:
        raise MismatchError(
            "LT-476", "adapters replicate layers differently and cannot be merged in one pass"
        )
    virtual = [b.bindings.checkpoint for b in bound if b.bindings.checkpoint is not None]
    return virtual[0] if virtual else base


def _sidecars(
    opened: Sequence[OpenedAdapter], base: Checkpoint, planned: MergePlan
) -> tuple[list[Sidecar], list[str]]:
    from loratool.store.sidecar import adapter_adds_tokens, plan_sidecars

    if not base.is_folder:
        return [], []
    tokenizer = None
    for one in opened:
        folder = one.adapter.path if one.adapter.path.is_dir() else one.adapter.path.parent
        if adapter_adds_tokens(folder, base.path):
            tokenizer = folder
    return plan_sidecars(base, adapter_tokenizer=tokenizer, config_changes=planned.config_changes)


def _record(
    opened: Sequence[OpenedAdapter],
    base: OpenedBase,
    names: NameOptions,
    dtype: str | None,
    shard_bytes: int | None,
) -> dict[str, Any]:
    inputs: dict[str, Any] = {}
    for one in opened:
        files = sorted({s.file for spec in one.adapter.specs for s in spec.fields.values()
                        if hasattr(s, "file")})  # fmt: skip
        config = files[0].with_name("adapter_config.json") if files else None
        extra = [config] if config is not None and config.is_file() else []
        label = content_label(one.adapter.path, inputs)
        inputs[label] = {"weight": one.weight, "files": adapter_id([*files, *extra])}
    label = content_label(base.resolved.path, inputs)
    inputs[label] = {"role": "base", "files": checkpoint_id(base.checkpoint)}
    if base.resolved.commit:
        inputs[label]["commit"] = base.resolved.commit
    b, r = names.bind, names.read
    options = option_values(
        dtype=DTYPES[dtype].word if dtype else None,
        shard_bytes=shard_bytes,
        rename=list(b.rename),
        skip=list(b.skip),
        allow_unmatched=b.allow_unmatched,
        untie=b.untie,
        keep_tied=b.keep_tied,
        resize_embeddings=b.resize_embeddings,
        alpha=r.alpha,
        rank_from=r.rank_from,
        mha_out_proj=r.mha_out_proj,
        moe_layout=r.moe_layout,
        experts_b_order=None if r.experts_b_order == "rank-major" else r.experts_b_order,
    )
    return provenance_of("merge", options=options, inputs=inputs)


def _predict(job: MergeJob, resources: Resources) -> list[Any]:
    from loratool.engine.run import execute
    from loratool.store.reader import FileReader

    with FileReader() as reader:
        return execute(job.merge.plan, reader, None, resources.run)


def _write(job: MergeJob, resources: Resources, force: bool, restart: bool) -> list[Any]:
    from loratool.engine.run import execute
    from loratool.engine.sink import CheckpointSink
    from loratool.store.jsonfile import dump_json
    from loratool.store.reader import FileReader
    from loratool.store.writer import MARKER, StagedOutput

    assert job.output is not None
    plan = job.merge.plan
    is_folder = job.base.checkpoint.is_folder
    output = StagedOutput(
        job.output,
        is_folder=is_folder,
        plan_id=f"{plan.plan_id()} {resources.device.partition(':')[0]}",
        force=force,
        restart=restart,
    )
    with output, FileReader() as reader:
        results = execute(plan, reader, CheckpointSink(plan, output), resources.run)
        reader.check_unchanged()
        if is_folder:
            for sidecar in job.sidecars:
                output.write_file(sidecar.name, sidecar.read())
            record = {**job.record, "device": resources.device.partition(":")[0]}
            output.write_file(MARKER, dump_json(record if job.record else {"loratool": True}))
            for name, index in index_files(plan, job.checkpoint).items():
                output.write_file(name, dump_json(index))
        output.commit()
    return results


def _report(
    job: MergeJob, resources: Resources, results: Sequence[Any], *, dry_run: bool, started: float
) -> MergeReport:
    from loratool.ops.loss import WARN_LOSS, module_losses

    plan = job.merge.plan
    sizes = {s.output.name: s.output.numel for s in plan.steps}
    summed = [r for r in results if _of(r, "delta_square") > 0]
    modules, total = module_losses(summed, sizes)
    loss = total.predicted_loss if dry_run else total.loss
    warnings = [_loss_warning(total, modules, dry_run)] if loss > WARN_LOSS else []
    notes = [*job.merge.notes, *job.sidecar_notes, *_cast_note(results)]
    if job.base.resolved.note:
        notes.insert(0, job.base.resolved.note)
    tokenizer = next((s.origin for s in job.sidecars if s.name == "tokenizer.json"), None)
    return MergeReport(
        output=str(job.output),
        adapters=tuple({"label": a.resolved.label, "weight": a.weight} for a in job.adapters),
        base=str(job.base.resolved.path),
        base_label=job.base.resolved.label,
        changed=len(job.merge.changed),
        copied=len(job.merge.copied),
        cast=len(job.merge.cast),
        created=len(job.checkpoint.tensors.keys() ^ {n for b in job.bound
                    for n in (*job.checkpoint.tensors, *b.bindings.new_tensors)}),
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
    )  # fmt: skip


def _of(result: Any, key: str) -> float:
    return float(result[key] if isinstance(result, dict) else getattr(result, key))


def _loss_warning(total: ModuleLoss, modules: Sequence[ModuleLoss], dry_run: bool) -> str:
    def lost(m: ModuleLoss) -> float:
        return m.predicted_loss if dry_run else m.loss

    worst = max(modules, key=lost)
    return (
        f"rounding to {total.dtype} loses {lost(total):.0%} of the change "
        f"(worst {worst.name} {lost(worst):.0%}): --dtype float32 keeps it"
    )


def _cast_note(results: Sequence[Any]) -> list[str]:
    cast = [r for r in results if _of(r, "delta_square") == 0 and _of(r, "error_square") > 0]
    weight = sum(_of(r, "weight_square") for r in cast)
    error = sum(_of(r, "error_square") for r in cast)
    if not weight:
        return []
    return [f"the cast of {len(cast)} other tensors moves them by {(error / weight) ** 0.5:.1e}"]
