"""Everything that merging and verifying know before the first tensor byte is read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.adapter import ReadOptions
from loratool.api.common import content_label, option_values
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
from loratool.ops.merge import MergePlan, WeightedAdapter, plan_merge
from loratool.ops.verify import merged_dtype
from loratool.store.checkpoint import Checkpoint
from loratool.store.provenance import adapter_id, checkpoint_id, provenance_of

if TYPE_CHECKING:
    from loratool.store.sidecar import Sidecar


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
    like: Checkpoint | None = None,
) -> MergeJob:
    """Open, bind and plan; nothing is written.

    ``like`` is a finished merge: the plan then casts as it did, whatever ``dtype`` says.
    """
    opened = open_adapters(texts, weights=weights, mean=mean, read=names.read, access=access)
    opened_base = open_base(str(base), opened, access)
    if output is not None:
        _check_output_form(output, opened_base)
        guard_output(output, [opened_base.resolved.named, *(a.resolved.named for a in opened)])
    bound = tuple(
        WeightedAdapter(o.adapter, o.weight, bind(o.adapter, opened_base.checkpoint, names.bind))
        for o in opened
    )
    checkpoint = _one_checkpoint(bound, opened_base.checkpoint)
    if like is not None:
        dtype = merged_dtype(opened_base.checkpoint, like)
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
