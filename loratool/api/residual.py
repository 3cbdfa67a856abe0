"""Save what the correctly rounded merge of an extracted adapter lacks of TUNED."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.api.common import plan_resources
from loratool.api.merge_job import MergeRequest, prepare_merge
from loratool.api.side_file import write_patches
from loratool.archs.ties import tied_tensors
from loratool.dialects import open_adapter
from loratool.engine.rows import args_of
from loratool.ops.access import Access
from loratool.ops.inputs import OpenedBase
from loratool.ops.residual import bind_options, config_of, plan_residual, residual_table
from loratool.options.groups import Mix, Names, Run
from loratool.report.extract import SavedResidual
from loratool.store.checkpoint import Checkpoint
from loratool.store.provenance import adapter_id, checkpoint_id, provenance_of

if TYPE_CHECKING:
    pass


def save_residual(
    path: Path,
    *,
    adapter: Path,
    identity: str,
    base: str | Path,
    tuned: OpenedBase,
    access: Access,
    run: Run,
    force: bool,
    provenance: bool,
) -> SavedResidual:
    """Write the residual file of an extraction whose adapter is complete but not yet in place.

    Always on the CPU, whose block grid the patches lie on: the same bytes everywhere.

    Args:
        path: file to create.
        adapter: the extracted adapter.
        identity: of the extraction's run.
        base: as typed.
        tuned: the fine-tune.
        access: network rules.
        run: workers and memory.
        force: replace an earlier loratool output.
        provenance: record inputs in the file.
    """
    from loratool.ops.inputs import open_base
    from loratool.store.patch_file import require_room

    checkpoint = open_base(str(base), [], access).checkpoint
    bind = _bind_options(tuned.checkpoint, checkpoint)
    job = prepare_merge(MergeRequest(
        [str(adapter)], base, bind_options(Names(), bind), access, Mix(weights=(1.0,)),
        rounding={"rounding": "exact"},
    ))  # fmt: skip
    plan = plan_residual(job.merge.plan, job.checkpoint, tuned.checkpoint)
    require_room([step.output.name for step in plan.steps], path)
    resources = plan_resources(plan, run.replace(device="cpu"))
    record: dict[str, Any] = {"operation": "residual", "plan": identity}
    if provenance:
        inputs = {"tuned": checkpoint_id(tuned.checkpoint), "base": checkpoint_id(checkpoint)}
        record |= provenance_of("residual", options={}, inputs=inputs)
    table = partial(
        residual_table, plan, adapter=adapter_id(open_adapter(adapter)), bind=bind,
        config=config_of(tuned.checkpoint, checkpoint),
    )  # fmt: skip
    size, results = write_patches(path, plan, resources, replaces=force, table=table, record=record)
    new = {s.output.name for s in plan.steps if args_of(s).how == "nothing"}
    patched = [r for r in results if r.count and r.name not in new]
    return SavedResidual(str(path), size, len(patched), sum(r.count for r in patched), len(new))


def _bind_options(tuned: Checkpoint, base: Checkpoint) -> dict[str, bool]:
    """Options under which the adapter merges into what TUNED is."""
    options = {"resize_embeddings": True}
    if tied_tensors(base):
        options["keep_tied" if tied_tensors(tuned) else "untie"] = True
    return options
