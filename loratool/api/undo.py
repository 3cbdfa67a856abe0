"""Undo files of a merge: written beside it, applied by `subtract`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.adapter import TensorRef
from loratool.api.common import Resources
from loratool.api.merge_job import MergeJob
from loratool.api.side_file import may_replace, write_patches
from loratool.dialects.stated import LAYERS
from loratool.engine.rows import op_of
from loratool.errors import MismatchError, UsageError
from loratool.frozen import Frozen, replace
from loratool.ops.inputs import guard_output
from loratool.ops.undo import (
    UndoFile,
    check_adapters,
    check_kept,
    plan_patches,
    plan_restore,
    undo_table,
)
from loratool.plan import Plan
from loratool.store.patch_file import require_room
from loratool.store.provenance import file_id
from loratool.store.sidecar import REMOVE, plan_sidecars

if TYPE_CHECKING:
    from loratool.engine.sink import CheckpointSink


class UndoJob(Frozen):
    """An undo file to be written.

    Attributes:
        path: where.
        identity: of the merge's run.
        replaces: an existing file may go.
        plan: of the patches, before the merge is written: what memory they will take.
    """

    path: Path
    identity: str
    replaces: bool
    plan: Plan


def plan_undo(
    job: MergeJob, path: Path, identity: str, *, casts: Sequence[str], force: bool
) -> UndoJob:
    """Plan an undo file, or refuse one that could not be written, before the work.

    Args:
        job: the merge.
        path: file to write.
        identity: of the merge's run.
        casts: options that give the weights another type or other values everywhere.
        force: replace an earlier loratool output.

    Raises:
        UsageError: the output has another type, or the name is not one of a file.
        MismatchError: the merge replicates layers, or leaves tensors of the base out.
        OutputError: the place is taken or lies in an input.
        DiskError: the folder is missing or not writable.
    """
    if path.suffix != ".safetensors":
        right = shlex.quote(str(path.with_suffix(".safetensors")))
        raise UsageError("LT-219", "an undo file is a .safetensors file", got=str(path),
                         hint=f"--save-undo {right}")  # fmt: skip
    if casts:
        raise UsageError(
            "LT-250", "an undo file of weights in another type would be as large as the base",
            got=", ".join(casts), hint="keep the base itself",
        )  # fmt: skip
    lost = sorted(set(job.base.checkpoint.tensors) - set(job.checkpoint.tensors))
    if lost or any(a.adapter.layer_order for a in job.adapters):
        raise MismatchError(
            "LT-454", "--save-undo needs every tensor of the base in the merged weights",
            file=job.base.checkpoint.path, key=lost[0] if lost else LAYERS,
            hint="keep the base itself",
        )  # fmt: skip
    assert job.output is not None
    sources = [job.base.resolved.path, *(a.resolved.path for a in job.adapters), job.output]
    guard_output(path, sources)
    replaces = may_replace(path, identity, force=force)
    outputs = [s.output for s in job.merge.plan.steps]
    places = {i: TensorRef(Path(o.name), o.name, o.dtype, o.shape, 0, o.nbytes)
              for i, o in enumerate(outputs)}  # fmt: skip
    patches = plan_patches(job.merge.plan, job.full_names, job.base.checkpoint, places)
    require_room([*(step.output.name for step in patches.plan.steps), *patches.kept], path)
    return UndoJob(path, identity, replaces, patches.plan)


def write_undo(job: MergeJob, undo: UndoJob, resources: Resources, sink: CheckpointSink) -> None:
    """Write the undo file of a merge whose shards are complete but not yet in place.

    Args:
        job: the merge.
        undo: of `plan_undo`.
        resources: for the patches.
        sink: where the merge has written.
    """
    merge, checkpoint = job.merge.plan, job.base.checkpoint
    written = {i: sink.written(step) for i, step in enumerate(merge.steps)}
    patches = plan_patches(merge, job.full_names, checkpoint, written)

    def table(results: dict[str, Any]) -> dict[str, Any]:
        return undo_table(
            patches, undo.identity, results, resources.run.elements,
            [(a.adapter, a.weight) for a in job.adapters], _base_config(job),
        )  # fmt: skip

    write_patches(undo.path, patches.plan, resources, replaces=undo.replaces, table=table,
                  record={"operation": "undo", "plan": undo.identity})  # fmt: skip


def _base_config(job: MergeJob) -> dict[str, Any]:
    """What the configuration said before the merge, by the keys that it changes."""
    found: dict[str, Any] = {}
    for key in job.merge.config_changes:
        value: Any = job.base.checkpoint.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        found[key] = value
    return found


def restore_job(job: MergeJob, undo: UndoFile, *, reads: bool) -> MergeJob:
    """Turn a subtraction into the exact restoration that an undo file allows.

    Args:
        job: the subtraction.
        undo: of the merge.
        reads: see now that what the merge left alone is still the base's.

    Raises:
        MismatchError: the undo file is for other adapters or other merged weights.
        BadFileError: it is damaged.
    """
    check_adapters(undo, [(a.adapter, a.weight.times(-1)) for a in job.adapters])
    checkpoint, names = job.base.checkpoint, job.full_names
    plan = plan_restore(job.merge.plan, names, checkpoint, undo)
    if reads:
        gone = undo.table.tensors.keys() | undo.table.created
        check_kept({n: checkpoint.tensors[n] for n in names.values() if n not in gone},
                   checkpoint.path, undo)  # fmt: skip
    config = {k: REMOVE if v is None else v for k, v in undo.table.config.items()}
    sidecars, notes = plan_sidecars(checkpoint, config_changes=config)
    job = replace(job, merge=replace(job.merge, plan=plan))
    left = job.full_names
    fates = {left[i]: op_of(s).fate for i, s in enumerate(plan.steps)}
    copied = tuple(name for name, fate in fates.items() if fate == "copied")
    restored = tuple(name for name, fate in fates.items() if fate == "changed")
    return replace(
        job,
        merge=replace(job.merge, changed=restored, copied=copied, cast=()),
        record={**job.record, "options": {"undo": file_id(undo.path)}} if job.record else {},
        sidecars=tuple(sidecars),
        sidecar_notes=tuple(notes),
        block_elements=undo.table.block_elements,
    )
