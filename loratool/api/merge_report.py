"""What `merge`, `subtract` and `swap` did, as a report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from loratool.api.common import Resources
from loratool.api.merge_job import MergeJob
from loratool.engine.rows import op_of
from loratool.errors import list_some
from loratool.frozen import asdict
from loratool.ops.input_notes import base_notes, input_warnings, nonfinite_warning
from loratool.report.base import Plain
from loratool.report.merge import MergeReport, ModuleLoss, SubtractReport, wide_options
from loratool.report.text import plural

_ROUNDED = 0.1
"""More than rounding to any type of 8 bits or more takes of a tensor."""


def merge_report(
    job: MergeJob,
    resources: Resources,
    results: Sequence[Any],
    run_notes: Sequence[str],
    *,
    dry_run: bool,
    started: float,
) -> MergeReport:
    """The report of a merge, from its plan and the results of its steps."""
    from loratool.ops.loss import module_losses

    plan = job.merge.plan
    names = job.full_names
    sizes = {names[i]: s.output.numel for i, s in enumerate(plan.steps)}
    results = [plain_result(r) for r in results]
    if not run_notes:  # else they are not in the order of the plan
        results = _under_full_names(results, job)
    sums = [r for r in results if "delta_square" in r]
    summed = [r for r in sums if r["delta_square"] > 0]
    modules, total = module_losses(summed, sizes)
    warnings = [*job.warnings, *_loss_warnings(total, modules, dry_run)]
    if not summed and not job.created and len(job.merge.changed) <= len(sums):
        warnings.append("nothing changes: every weight or change is 0, or they cancel")
    warnings += [*_cast_warnings(sums), *input_warnings(job.adapters), *nonfinite_warning(sums)]
    extra: dict[str, Any] = _restored(results) if job.operation.report is SubtractReport else {}
    return job.operation.report(
        output=str(job.output),
        adapters=tuple({"label": a.resolved.label, **a.weight.to_json()} for a in job.adapters),
        base=str(job.base.resolved.named),
        base_label=job.base.resolved.label,
        changed=len(job.merge.changed),
        copied=len({*job.merge.copied} - {*job.created}),
        cast=len({*job.merge.cast} - {*job.created}),
        created=len({*job.created, *job.merge.created,
                     *(n for b in job.bound for n in b.bindings.new_tensors)}),
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
        notes=tuple(dict.fromkeys(
            [*_notes(job, sums, run_notes), *_sample_note(job, sums, dry_run)]
        )),
        sidecars=tuple(s.name for s in job.sidecars),
        tokenizer=_tokenizer(job),
        dry_run=dry_run,
        plan=Plain(plan.to_json()) if dry_run else None,
        **extra,
    )  # fmt: skip


def _under_full_names(results: Sequence[dict[str, Any]], job: MergeJob) -> list[dict[str, Any]]:
    """Results by checkpoint-wide names: two text encoders have the same ones in their files."""
    full: dict[str, list[str]] = {}
    names = job.full_names
    for i, step in enumerate(job.merge.plan.steps):
        if not op_of(step).moves_bytes:
            full.setdefault(step.output.name, []).append(names[i])
    return [
        {**r, "name": full[r["name"]].pop(0)} if full.get(r.get("name", "")) else r for r in results
    ]


def plain_result(result: Any) -> dict[str, Any]:
    """A kernel's result as the journal has it."""
    return result if isinstance(result, dict) else asdict(result)


def _restored(results: Sequence[dict[str, Any]]) -> dict[str, int]:
    counts = [r["count"] for r in results if "count" in r]
    return {"restored": len(counts), "corrected": sum(counts)}


def _tokenizer(job: MergeJob) -> str | None:
    """Whose tokenizer goes along."""
    whose = {s.name: s.origin for s in job.sidecars}
    return next((whose[n] for n in ("tokenizer.json", "tokenizer_config.json") if n in whose), None)


def _notes(job: MergeJob, sums: Sequence[dict[str, Any]], run_notes: Sequence[str]) -> list[str]:
    return [
        *([job.base.resolved.note] if job.base.resolved.note else []),
        *run_notes,
        *base_notes(() if job.operation.signs else job.adapters, job.base),
        *job.merge.notes,
        *job.sidecar_notes,
        *_cast_note(sums),
        *_exact_note(sums),
        *_checked_note(sum(op_of(s).is_proven for s in job.merge.plan.steps)),
    ]


def _checked_note(count: int) -> list[str]:
    which = plural(count, "tensor is", "tensors are")
    return [f"{which} the fine-tune's, bit for bit: each is checked"] if count else []


def _sample_note(job: MergeJob, sums: Sequence[Any], dry_run: bool) -> list[str]:
    many = sum(op_of(step).is_sampled for step in job.merge.plan.steps)
    if not dry_run or len(sums) >= many:
        return []
    return [f"the loss is predicted from {len(sums)} of {many:,} tensors that change"]


def _loss_warnings(total: ModuleLoss, modules: Sequence[ModuleLoss], dry_run: bool) -> list[str]:
    from loratool.ops.loss import WARN_LOSS

    def lost(m: ModuleLoss) -> float:
        return m.predicted_loss if dry_run else m.loss

    if not lost(total) > WARN_LOSS:
        return []
    worst = max(modules, key=lost)
    return [
        f"rounding to {total.dtype} loses {lost(total):.0%} of the change "
        f"(worst {worst.name} {lost(worst):.0%}): {wide_options(modules)} keeps it"
    ]


def _cast_note(results: Sequence[dict[str, Any]]) -> list[str]:
    cast = [r for r in results if r["delta_square"] == 0 and r["error_square"] > 0]
    weight = sum(r["weight_square"] for r in cast)
    error = sum(r["error_square"] for r in cast)
    if not weight:
        return []
    moved = plural(len(cast), "other tensor")
    return [f"the cast of {moved} moves them by {(error / weight) ** 0.5:.1e}"]


def _cast_warnings(results: Sequence[dict[str, Any]]) -> list[str]:
    """Of tensors that a cast does not just round: below float16's normal numbers little is left."""
    cast = [r for r in results if not r["delta_square"]]
    lost = [r["name"] for r in cast if r["error_square"] > _ROUNDED**2 * r["weight_square"]]
    if not lost:
        return []
    return [
        f"the cast takes more than a tenth of {list_some(lost, 3)}: its values are below what the "
        "type can hold; --dtype bfloat16 or float32 keeps them"
    ]


def _exact_note(results: Sequence[dict[str, Any]]) -> list[str]:
    count = sum(r["settled"] for r in results)
    return [f"{plural(count, 'element')} needed exact sums"] if count else []
