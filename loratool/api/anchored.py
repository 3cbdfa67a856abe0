"""Merged weights whose changes refer to the base that their adapters were trained on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from loratool.api.merge_job import MergeJob
from loratool.api.session import base_row
from loratool.errors import UsageError
from loratool.frozen import replace
from loratool.ops.access import Access
from loratool.ops.inputs import open_base
from loratool.ops.replay import ORIGINAL
from loratool.ops.subtract import anchored, column_notes, depends_on_base, may_keep_columns


def anchor(
    job: MergeJob, base: str | Path | None, access: Access, *, exact: bool = False
) -> MergeJob:
    """With a base, changes that depend on the base refer to its tensors, not to the merged ones.

    Args:
        job: of taking out of, or putting into, merged weights.
        base: what the adapters were trained on; None = nothing depends on it.
        access: how it may be reached.
        exact: sums are to be correctly rounded.

    Raises:
        UsageError: LT-251, such changes have no exact sum.
        MismatchError: LT-455, the base lacks such a tensor, or has it in another shape.
    """
    plan = job.merge.plan
    grown = may_keep_columns(job.bound)
    needs_base = any(depends_on_base(step) for step in plan.steps)
    if base is None or not (needs_base or grown):
        return with_notes(job, column_notes(grown, job.checkpoint, None))
    if exact and needs_base:
        raise UsageError("LT-251", "--exact is for sums of products, --base for all others")
    opened = open_base(str(base), [a.adapter for a in job.adapters], access)
    job = with_notes(job, column_notes(grown, job.checkpoint, opened.checkpoint))
    if not needs_base:
        return job
    row = base_row(opened, plan.inputs, role=ORIGINAL)
    plan = anchored(plan, job.full_names, opened.checkpoint)
    plan = replace(plan, inputs={**plan.inputs, **row})
    record = {**job.record, "inputs": {**job.record["inputs"], **row}} if job.record else {}
    if record and not job.base.checkpoint.is_folder:
        (shard,) = plan.shards
        metadata = {**shard.metadata, "loratool": json.dumps(record)}
        plan = replace(plan, shards=(replace(shard, metadata=metadata),))
    return replace(job, merge=replace(job.merge, plan=plan), record=record)


def with_notes(job: MergeJob, notes: Sequence[str]) -> MergeJob:
    """The same job, which says more."""
    return replace(job, sidecar_notes=(*job.sidecar_notes, *notes))
