"""Everything that merging and verifying know before the first tensor byte is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.adapter import ReadOptions, TensorRef
from loratool.api.common import content_label, option_values
from loratool.archs.ties import is_embedding
from loratool.dtypes import DTYPES
from loratool.errors import MismatchError, UsageError
from loratool.ops.bind import BindOptions, bind
from loratool.ops.coded import Decoded, decode_base
from loratool.ops.heads import take_heads
from loratool.ops.inputs import (
    Access,
    OpenedAdapter,
    OpenedBase,
    guard_output,
    open_adapters,
    open_base,
)
from loratool.ops.merge import MergePlan, WeightedAdapter, plan_merge
from loratool.ops.new_parts import add_parts
from loratool.ops.residual import patch_merge
from loratool.ops.verify import merged_dtype
from loratool.ops.weights import Rule, rules_json, unused_rules
from loratool.plan import Plan
from loratool.report import MergeReport
from loratool.store.checkpoint import Checkpoint
from loratool.store.provenance import adapter_id, checkpoint_id, provenance_of
from loratool.store.source import AdapterArgument

if TYPE_CHECKING:
    from loratool.ops.residual import Residual
    from loratool.store.sidecar import Sidecar


@dataclass(frozen=True)
class NameOptions:
    """How names, missing facts of adapters and codes of the base are understood.

    Attributes:
        bind: names.
        read: what adapters do not say.
        codes: what becomes of quantised weights: ``dequantize`` or ``requant``; "" = there are
            none.
    """

    bind: BindOptions
    read: ReadOptions
    codes: str = ""


@dataclass(frozen=True)
class Operation:
    """What the one engine is used for: putting adapters in, or taking some out.

    Attributes:
        name: command, as provenance has it.
        signs: +1 or -1 per adapter; empty = all +1.
        report: class of the report.
        check: called with the bound adapters before anything is planned; refuses what cannot
            be taken out, and may leave out what need not be.
        replan: called with the finished job; may turn its plan into another one.
        inputs: files that it reads beside adapters and base.
    """

    name: str = "merge"
    signs: tuple[int, ...] = ()
    report: type[MergeReport] = MergeReport
    check: Callable[[tuple[WeightedAdapter, ...]], tuple[WeightedAdapter, ...]] | None = None
    replan: Callable[[MergeJob], MergeJob] | None = None
    inputs: tuple[str | Path, ...] = ()


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
        operation: what the engine is used for.
        block_elements: block size of the grid; None = the device's.
        warnings: what the user should not overlook.
        created: tensors of a head or of another part that an adapter brings.
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
    operation: Operation = Operation()
    block_elements: int | None = None
    warnings: tuple[str, ...] = ()
    created: tuple[str, ...] = ()

    @property
    def full_names(self) -> dict[int, str]:
        """Step index -> checkpoint-wide name (steps carry the name inside their file)."""
        prefixes = {s.name: s.prefix for s in self.checkpoint.shards}
        shards = self.merge.plan.shards
        return {
            i: prefixes.get(shards[step.shard].name, "") + step.output.name
            for i, step in enumerate(self.merge.plan.steps)
        }


def prepare_merge(
    texts: Sequence[str | Path | AdapterArgument],
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
    rounding: Mapping[str, Any] | None = None,
    operation: Operation | None = None,
    residual: Residual | None = None,
    checksum: bool = False,
    module_weights: Sequence[Rule] = (),
    like: Checkpoint | None = None,
    tokenizer: str | None = None,
) -> MergeJob:
    """Open, bind and plan; nothing is written.

    ``like`` is a finished merge: the plan then casts as it did, whatever ``dtype`` says.
    ``module_weights`` multiply the changes of single modules.
    ``tokenizer`` is ``base`` or ``adapter``: whose tokenizer and settings go along where they
    differ; None = the adapter's.
    ``residual`` turns the plan into one that gives a fine-tune back, bit for bit.
    """
    kind = operation or Operation()
    opened = open_adapters(
        texts, weights=weights, mean=mean, read=names.read, access=access, rules=module_weights
    )
    if kind.signs:
        opened = [
            replace(o, weight=o.weight.times(s)) for o, s in zip(opened, kind.signs, strict=True)
        ]
    opened_base = open_base(str(base), [o.adapter for o in opened], access)
    decoded = Decoded(opened_base.checkpoint)
    if names.codes:
        decoded = decode_base(opened_base.checkpoint, keep=names.codes == "requant", dtype=dtype)
        opened_base = replace(opened_base, checkpoint=decoded.checkpoint)
    if output is not None:
        _check_output_form(output, opened_base)
        guard_output(output, [opened_base.resolved.named, *(a.resolved.named for a in opened)])
        guard_output(output, _files(opened, opened_base))
    kept = [o.weight.kept(o.adapter) for o in opened]
    acting = [a for a, o in zip(kept, opened, strict=True) if o.weight.value]
    headed = take_heads(acting, opened_base.checkpoint, names.bind.skip)
    bound = tuple(
        WeightedAdapter(adapter, o.weight, bind(adapter, headed.checkpoint, names.bind))
        for o, adapter in zip(opened, kept, strict=True)
    )
    if kind.check is not None:
        bound = kind.check(bound)
    parts = add_parts(bound, _one_checkpoint(bound, headed.checkpoint))
    checkpoint = parts.checkpoint
    if like is not None:
        dtype = merged_dtype(checkpoint, like)
    options = {**_options(names, dtype, shard_bytes), **(rounding or {})}
    if scaled := sorted({name for b in bound for name in b.bindings.scales}):
        options["scaled"] = scaled
    if module_weights:
        options["module_weights"] = rules_json(module_weights)
    record = provenance_of(
        kind.name, options=options, inputs=_inputs(opened, opened_base, checksum)
    )
    metadata = None
    if not opened_base.checkpoint.is_folder and with_provenance:
        metadata = {"loratool": json.dumps(record)}
    planned = plan_merge(
        bound, checkpoint, dtype=dtype, shard_bytes=shard_bytes, file_metadata=metadata,
        rounding=rounding,
    )  # fmt: skip
    planned = replace(
        planned,
        config_changes={
            **decoded.config_changes,
            **headed.config_changes,
            **parts.config_changes,
            **planned.config_changes,
        },
        notes=(*decoded.notes, *headed.notes, *parts.notes, *planned.notes),
    )
    if residual is not None:
        planned = patch_merge(planned, checkpoint, residual)
    given = opened if not kind.signs else []  # what is taken out brings no tokenizer along
    sidecars, notes = _sidecars(
        given, bound if given else (), opened_base.checkpoint, planned, tokenizer
    )
    plan = replace(planned.plan, options=options, inputs=record["inputs"])
    if output is not None and not opened_base.checkpoint.is_folder:
        shards = (replace(plan.shards[0], name=output.name),)
        plan = replace(plan, shards=shards)
    job = MergeJob(
        tuple(opened),
        opened_base,
        checkpoint,
        replace(planned, plan=plan),
        bound,
        tuple(sidecars),
        (*notes, *unused_rules([o.adapter for o in opened], module_weights)),
        record if with_provenance else {},
        output,
        kind,
        warnings=(
            *headed.warnings,
            *parts.warnings,
            *(_token_warnings(sidecars, plan) if output else ()),
        ),
        created=(*headed.created, *parts.created),
    )
    return job if kind.replan is None else kind.replan(job)


def _files(opened: Sequence[OpenedAdapter], base: OpenedBase) -> list[Path]:
    """The input files themselves: links may lead to other folders than the ones named."""
    sources = [s for o in opened for spec in o.adapter.specs for s in spec.fields.values()]
    adapters = {s.path for s in sources if isinstance(s, TensorRef)}
    return [*sorted(adapters), *(shard.path for shard in base.checkpoint.shards)]


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
    opened: Sequence[OpenedAdapter],
    bound: Sequence[WeightedAdapter],
    base: Checkpoint,
    planned: MergePlan,
    tokenizer: str | None,
) -> tuple[list[Sidecar], list[str]]:
    from loratool.store.own_settings import Owner, settle_settings
    from loratool.store.sidecar import plan_sidecars

    if not base.is_folder:
        return [], []
    owners = [Owner(one.adapter.label, one.adapter.extras) for one in opened]
    settle = partial(
        settle_settings, owners=owners, whose=tokenizer, is_pipeline=bool(base.components)
    )
    files, notes = plan_sidecars(base, settle=settle, config_changes=planned.config_changes)
    return [*files, *_value_heads(bound)], notes


def _value_heads(bound: Sequence[WeightedAdapter]) -> list[Sidecar]:
    """Weights that trainers look for in a file of their own, beside the model's."""
    from loratool.store.sidecar import Sidecar
    from loratool.store.stamps import stamp_of

    found: dict[str, Sidecar] = {}
    for one in bound:
        for name, path in one.adapter.extras.items():
            if not name.endswith(".safetensors") or name in one.bindings.skipped:
                continue
            if name in found:
                raise MismatchError(
                    "LT-426", "two adapters bring a file of the same name", file=one.adapter.path,
                    key=name, got=str(found[name].source), hint=f"--skip {name} leaves both out",
                )  # fmt: skip
            found[name] = Sidecar(name, path, stamp_of(path), origin="adapter")
    return list(found.values())


def _token_warnings(sidecars: Sequence[Sidecar], plan: Plan) -> list[str]:
    """Ids that the tokenizer may give and the embedding has no row for."""
    from loratool.store.tokens import highest_id

    rows = [s.output.shape[0] for s in plan.steps
            if len(s.output.shape) == 2 and is_embedding(s.output.name)]  # fmt: skip
    highest = highest_id({s.name: s.source for s in sidecars if s.source}) if rows else None
    if highest is None or highest[0] < min(rows):
        return []
    return [
        f"the tokenizer gives ids up to {highest[0]} ({highest[1]}), the embedding has "
        f"{min(rows)} rows: such tokens cannot be used"
    ]


def _inputs(opened: Sequence[OpenedAdapter], base: OpenedBase, checksum: bool) -> dict[str, Any]:
    inputs: dict[str, Any] = {}
    for one in opened:
        label = content_label(one.resolved, inputs)
        inputs[label] = {**one.weight.to_json(), "files": adapter_id(one.adapter)}
    label = content_label(base.resolved, inputs)
    inputs[label] = {"role": "base", "files": checkpoint_id(base.checkpoint, full=checksum)}
    return inputs


def _options(names: NameOptions, dtype: str | None, shard_bytes: int | None) -> dict[str, Any]:
    b, r = names.bind, names.read
    return option_values(
        dtype=DTYPES[dtype].word if dtype else None,
        shard_bytes=shard_bytes,
        rename=list(b.rename),
        skip=list(b.skip),
        allow_unmatched=b.allow_unmatched,
        untie=b.untie,
        keep_tied=b.keep_tied,
        resize_embeddings=b.resize_embeddings,
        codes=names.codes,
        alpha=r.alpha,
        rank_from=r.rank_from,
        mha_out_proj=r.mha_out_proj,
        moe_layout=r.moe_layout,
        experts_b_order=r.experts_b_order,
    )
