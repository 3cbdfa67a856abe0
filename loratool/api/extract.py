"""`extract`: a low-rank adapter from a full fine-tune."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.adapter import Adapter
from loratool.api.common import (
    Resources,
    file_rules,
    option_values,
    plan_resources,
    recorded_name,
)
from loratool.dialects import open_adapter, write_adapter_files
from loratool.errors import UsageError
from loratool.ops.assemble import Outcome, assemble
from loratool.ops.extract import ExtractPlan, plan_extract
from loratool.ops.inputs import Access, OpenedBase, guard_output, open_base
from loratool.ops.loads import judge_loads
from loratool.report import ExtractedModule, ExtractReport
from loratool.store.adapter_writer import fill_adapter, stage_adapter
from loratool.store.output_path import check_output
from loratool.store.provenance import checkpoint_id, provenance_of

if TYPE_CHECKING:
    from loratool.engine.run import Progress


def extract(
    tuned: str | Path,
    *,
    base: str | Path,
    output: str | Path,
    rank: int,
    keep: Sequence[str] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    names: str = "v5",
    device: str = "auto",
    threads: int | None = None,
    max_memory: str | int | None = None,
    force: bool = False,
    dry_run: bool = False,
    offline: bool = False,
    yes: bool = False,
    provenance: bool = True,
    max_header: str | int | None = None,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> ExtractReport:
    """Best rank-R approximation of tuned - base, module by module, as a PEFT adapter.

    Args:
        tuned: the fine-tuned checkpoint.
        base: what it was tuned from.
        output: folder to create.
        rank: rank of every module (cut to its short side).
        keep: ``embeddings``, ``all``, ``none`` or regular expressions: tensors stored whole.
            Small ones (biases, norms) are unless ``none``.
        include: regular expressions; only modules that match are factored, embeddings too.
        exclude: regular expressions of modules that are not factored.
        names: ``v5`` (names of transformers 5 in memory) or ``v4`` (names on disk).
        device: ``auto``, ``cpu`` or ``cuda[:n]``.
        threads: workers; None = twice the cores, at most 8.
        max_memory: limit for the planned peak.
        force: replace an earlier loratool output.
        dry_run: plan, write nothing.
        offline: never touch the network.
        yes: agree to large downloads.
        provenance: record inputs and options in the output.
        max_header: largest safetensors header accepted, such as ``"64MB"``.
        allow_pickle: convert pickles first, in a locked process.
        progress: called with (bytes done, bytes in all).

    Returns:
        Captured energy and error per module and in all; what was kept and left out.

    Raises:
        LoratoolError: see ``docs/errors.md``.
    """
    started = time.monotonic()
    _check_rank(rank)
    if names not in ("v4", "v5"):
        raise UsageError("LT-226", "unknown --names", expected="v4 or v5", got=names)
    access, target = Access(offline, yes, file_rules(max_header, allow_pickle)), Path(output)
    if not dry_run:  # before a long download, not after it
        guard_output(target, [p for p in map(Path, (tuned, base)) if p.exists()])
        check_output(target, is_folder=True, force=force)
    if target.suffix in (".safetensors", ".gguf", ".bin", ".pt"):  # "qwen2.5-lora" is a folder
        raise UsageError(
            "LT-227", "a PEFT adapter is a folder", expected="a folder for -o", got=str(output)
        )
    tuned_opened = open_base(str(tuned), [], access)
    base_opened = open_base(str(base), [], access)
    guard_output(target, [tuned_opened.resolved.named, base_opened.resolved.named])
    plan = plan_extract(
        tuned_opened.checkpoint,
        base_opened.checkpoint,
        rank=rank,
        include=include,
        exclude=exclude,
        keep=keep,
        names=names,
    )
    resources = plan_resources(
        plan.plan,
        device=device,
        threads=threads,
        max_memory=max_memory,
        chunk_bytes=None,
        sample=dry_run,
        progress=progress,
    )
    if dry_run:
        return _planned(plan, tuned_opened, base_opened, target, rank, started)
    label = str(base) if base_opened.resolved.commit else recorded_name(base_opened.resolved.path)
    record: dict[str, Any] = {}
    if provenance:
        options = option_values(
            rank=rank, keep=list(keep), include=list(include), exclude=list(exclude),
            names=None if names == "v5" else names, device=resources.run.device.type,
        )  # fmt: skip
        inputs = {
            "tuned": checkpoint_id(tuned_opened.checkpoint),
            "base": checkpoint_id(base_opened.checkpoint),
        }
        record = provenance_of("extract", options=options, inputs=inputs)
    with stage_adapter(target, force=force) as staged:  # refusals before the work, not after it
        results = _run(plan, resources)
        adapter, outcomes = assemble(
            plan, results, keep=keep, base=base_opened.checkpoint, base_model=label
        )
        files = write_adapter_files(
            adapter,
            "peft",
            base_config=base_opened.checkpoint.config,
            base_tensors=plan.memory_names.values(),
        )
        size = fill_adapter(staged, files, record=record)
    written = open_adapter(target)  # our own loader must find what was written
    return _report(plan, outcomes, written, tuned_opened, base_opened, target, rank, size, started)


def _check_rank(rank: int) -> None:
    if isinstance(rank, float):
        raise UsageError("LT-228", "--rank is a whole number", got=rank, hint="--rank 8")
    if not 1 <= rank <= 8192:
        raise UsageError("LT-229", "--rank out of range", expected="1 to 8192", got=rank)


def _run(plan: ExtractPlan, resources: Resources) -> list[Any]:
    from loratool.engine.run import execute
    from loratool.store.reader import FileReader
    from loratool.store.stamps import take_stamps

    with FileReader(take_stamps(plan.plan.refs())) as reader:
        results = execute(plan.plan, reader, None, resources.run)
        reader.check_unchanged()
    return results


def _report(
    plan: ExtractPlan,
    outcomes: Sequence[Outcome],
    adapter: Adapter | None,
    tuned: OpenedBase,
    base: OpenedBase,
    target: Path,
    rank: int,
    size: int,
    started: float,
) -> ExtractReport:
    factored = [o for o in outcomes if o.fate == "factored"]
    left = [o for o in outcomes if o.fate == "left_out"]
    modules = tuple(
        ExtractedModule(
            name=plan.memory_names[o.pair.name],
            family=_family(plan.memory_names[o.pair.name], o.pair.role),
            shape=o.pair.tuned.shape,
            rank=o.rank,
            norm=math.sqrt(o.delta_square),
            captured_energy=1 - _share(o.residual_square, o.delta_square),
            relative_error=math.sqrt(_share(o.residual_square, o.delta_square)),
        )
        for o in factored
    )
    delta = math.fsum(o.delta_square for o in outcomes)
    residual = math.fsum(o.residual_square for o in outcomes)
    low_delta = math.fsum(o.delta_square for o in factored)
    low_residual = math.fsum(o.residual_square for o in factored)
    buffers = tuple(
        o.pair.name for o in outcomes if o.pair.role == "buffer" and o.fate == "left_out"
    )
    return ExtractReport(
        output=str(target),
        tuned=tuned.resolved.label,
        base=base.resolved.label,
        rank=rank,
        modules=modules,
        kept=tuple((o.pair.name, o.pair.tuned.nbytes) for o in outcomes if o.fate == "kept"),
        left_out=tuple(
            (o.pair.name, o.pair.tuned.shape, o.pair.tuned.nbytes,
             math.sqrt(_share(o.delta_square, o.weight_square)))
            for o in left if o.pair.name not in buffers
        ),
        identical=sum(o.fate == "identical" for o in outcomes),
        buffers=buffers,
        captured_energy=1 - _share(low_residual, low_delta),
        relative_error=math.sqrt(_share(low_residual, low_delta)),
        total_relative_error=math.sqrt(_share(residual, delta)),
        output_bytes=size,
        seconds=time.monotonic() - started,
        loads_in=judge_loads(adapter) if adapter is not None else (),
        warnings=(),
        notes=plan.notes,
        dry_run=False,
    )  # fmt: skip


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def _family(name: str, role: str) -> str:
    return name.rpartition(".")[2] if role == "experts" else name.split(".")[-2]


def _planned(
    plan: ExtractPlan,
    tuned: OpenedBase,
    base: OpenedBase,
    target: Path,
    rank: int,
    started: float,
) -> ExtractReport:
    outcomes = [
        Outcome(p, "factored" if p.is_factored else "left_out", 0.0, 0.0, 0.0) for p in plan.pairs
    ]
    report = _report(plan, outcomes, None, tuned, base, target, rank, 0, started)
    from dataclasses import replace

    return replace(report, dry_run=True)
