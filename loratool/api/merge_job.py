"""Everything that merging and verifying know before the first tensor byte is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.adapter import TensorRef
from loratool.api.common import content_label, free_label
from loratool.api.merge_sidecars import merge_sidecars, token_warnings
from loratool.bind.altered import Altered
from loratool.bind.heads import take_heads
from loratool.dtypes import DTYPES
from loratool.errors import MismatchError, UsageError
from loratool.frozen import Frozen, field, replace
from loratool.ops.access import Access
from loratool.ops.batch import FILES
from loratool.ops.coded import decode_base, read_plain
from loratool.ops.inputs import OpenedAdapter, OpenedBase, guard_output, open_adapters, open_base
from loratool.ops.merge import MergePlan, plan_merge
from loratool.ops.merge_parts import WeightedAdapter, bind_weighted
from loratool.ops.new_parts import add_parts
from loratool.ops.residual import patch_merge
from loratool.ops.simulated import simulate_base
from loratool.ops.split import without_weights
from loratool.ops.verify import merged_dtype
from loratool.ops.weights import Rule, rules_json, unused_rules
from loratool.options.groups import Codes, Mix, Names
from loratool.options.words import recorded
from loratool.report.merge import MergeReport
from loratool.store.checkpoint import Checkpoint
from loratool.store.provenance import (
    adapter_id,
    adapter_sizes,
    checkpoint_id,
    file_id,
    provenance_of,
)
from loratool.store.source import AdapterArgument

if TYPE_CHECKING:
    from loratool.ops.residual import Residual
    from loratool.store.sidecar import Sidecar


class Operation(Frozen):
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


SPLIT = Operation("split", check=without_weights)


class MergeJob(Frozen):
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


class MergeRequest(Frozen):
    """What is to be merged, as `merge`, `verify` and others ask for it.

    Attributes:
        adapters: as typed, or already taken apart.
        base: the checkpoint, or ``auto``.
        names: how names and missing facts are understood.
        access: how sources may be reached.
        mix: coefficients; none = those in ``adapters``.
        rules: weights of single modules.
        dtype: safetensors name of the type to cast to; None keeps each type.
        shard_bytes: largest shard; None keeps the base's shards.
        output: final place; None = nothing is written.
        with_provenance: record inputs and options.
        identify: adapters are told by the sha256 of their files, as what is written has it; else
            by their sizes.
        rounding: how sums are formed and rounded.
        operation: what the engine is used for.
        residual: turns the plan into one that gives a fine-tune back, bit for bit.
        checksum: record the sha256 of every base file too.
        like: a finished merge; the plan casts as it did, whatever ``dtype`` says.
        tokenizer: ``base`` or ``adapter``: whose tokenizer and settings go along; None = the
            adapter's.
        codes: what becomes of quantised weights; None = they are only looked at.
    """

    adapters: Sequence[str | Path | AdapterArgument]
    base: str | Path
    names: Names
    access: Access
    mix: Mix = field(default_factory=Mix)
    rules: Sequence[Rule] = ()
    dtype: str | None = None
    shard_bytes: int | None = None
    output: Path | None = None
    with_provenance: bool = False
    identify: bool = False
    rounding: Mapping[str, Any] = field(default_factory=dict)
    operation: Operation = field(default_factory=Operation)
    residual: Residual | None = None
    checksum: bool = False
    like: Checkpoint | None = None
    tokenizer: str | None = None
    codes: Codes | None = field(default_factory=Codes)


def prepare_merge(asked: MergeRequest) -> MergeJob:
    """Open, bind and plan; nothing is written."""
    opened, base = _open(asked)
    seen = _decoded(asked, base.checkpoint)
    base = replace(base, checkpoint=seen.checkpoint)
    bound, seen = _bind(asked, opened, seen)
    seen = seen.then(add_parts(bound, _one_checkpoint(bound, seen.checkpoint)))
    if asked.like is not None:
        asked = replace(asked, dtype=merged_dtype(seen.checkpoint, asked.like))
    record = _record(asked, opened, base, bound)
    planned = _plan(asked, bound, seen, record)
    given = [] if asked.operation.signs else opened  # what is taken out brings no tokenizer along
    sidecars, notes = merge_sidecars(
        given, bound if given else (), base.checkpoint, planned, asked.tokenizer
    )
    plan = replace(planned.plan, options=record["options"], inputs=record["inputs"])
    if asked.output is not None and not base.checkpoint.is_folder:
        plan = replace(plan, shards=(replace(plan.shards[0], name=asked.output.name),))
    tokens = token_warnings(sidecars, plan) if asked.output else []
    job = MergeJob(
        tuple(opened),
        base,
        seen.checkpoint,
        replace(planned, plan=plan),
        bound,
        tuple(sidecars),
        (*notes, *unused_rules([o.adapter for o in opened], asked.rules)),
        record if asked.with_provenance else {},
        asked.output,
        asked.operation,
        warnings=(*seen.warnings, *tokens),
        created=seen.created,
    )
    replan = asked.operation.replan
    return job if replan is None else replan(job)


def _open(asked: MergeRequest) -> tuple[list[OpenedAdapter], OpenedBase]:
    """Adapters with their signs, and the base, none of which the output lies in."""
    opened = open_adapters(
        asked.adapters, asked.mix, read=asked.names, access=asked.access, rules=asked.rules
    )
    if signs := asked.operation.signs:
        opened = [replace(o, weight=o.weight.times(s)) for o, s in zip(opened, signs, strict=True)]
    base = open_base(str(asked.base), [o.adapter for o in opened], asked.access)
    if asked.output is not None:
        _check_output_form(asked.output, base)
        guard_output(asked.output, [base.resolved.named, *(a.resolved.named for a in opened)])
        guard_output(asked.output, _files(opened, base))
    return opened, base


def _decoded(asked: MergeRequest, base: Checkpoint) -> Altered:
    """The base with its quantised weights as numbers, where that is asked for."""
    if asked.codes is None:
        plain, notes = read_plain(base)
        return Altered(plain, notes=notes)
    if asked.codes.simulate_quant is not None:
        return simulate_base(base, asked.codes.simulate_quant)
    if not (asked.codes.dequantize or asked.codes.requant):
        return Altered(base)
    return decode_base(base, keep=asked.codes.requant, dtype=asked.dtype)


def _bind(
    asked: MergeRequest, opened: Sequence[OpenedAdapter], seen: Altered
) -> tuple[tuple[WeightedAdapter, ...], Altered]:
    """Adapters with their targets, and the base with the heads that they bring."""
    kept = [o.weight.kept(o.adapter) for o in opened]
    acting = [a for a, o in zip(kept, opened, strict=True) if o.weight.value]
    seen = seen.then(take_heads(acting, seen.checkpoint, asked.names.skip))
    bound = tuple(
        bind_weighted(adapter, o.weight, seen.checkpoint, asked.names)
        for o, adapter in zip(opened, kept, strict=True)
    )
    check = asked.operation.check
    return (bound if check is None else check(bound)), seen


def _record(
    asked: MergeRequest,
    opened: Sequence[OpenedAdapter],
    base: OpenedBase,
    bound: Sequence[WeightedAdapter],
) -> dict[str, Any]:
    """The provenance of what is planned."""
    form: dict[str, Any] = {"shard_bytes": asked.shard_bytes}
    if asked.dtype is not None:
        form = {"dtype": DTYPES[asked.dtype].word, **form}
    options = {k: v for k, v in form.items() if v is not None}
    options |= {**recorded(asked.names), **recorded(asked.codes or Codes()), **asked.rounding}
    if scaled := sorted({name for b in bound for name in b.bindings.scales}):
        options["scaled"] = scaled
    if asked.rules:
        options["module_weights"] = rules_json(asked.rules)
    inputs = _inputs(opened, base, asked)
    return provenance_of(asked.operation.name, options=options, inputs=inputs)


def _plan(
    asked: MergeRequest, bound: Sequence[WeightedAdapter], seen: Altered, record: Mapping[str, Any]
) -> MergePlan:
    """The plan, and what is said of it and of the base."""
    metadata = None
    if not seen.checkpoint.is_folder and asked.with_provenance:
        metadata = {"loratool": json.dumps(record)}
    planned = plan_merge(
        bound, seen.checkpoint, dtype=asked.dtype, shard_bytes=asked.shard_bytes,
        file_metadata=metadata, rounding=asked.rounding,
    )  # fmt: skip
    planned = replace(
        planned, config_changes={**seen.config_changes, **planned.config_changes},
        notes=(*seen.notes, *planned.notes),
    )  # fmt: skip
    if asked.residual is None:
        return planned
    return patch_merge(planned, seen.checkpoint, asked.residual)


def _files(opened: Sequence[OpenedAdapter], base: OpenedBase) -> list[Path]:
    """The input files themselves: links may lead to other folders than the ones named."""
    sources = [s for o in opened for spec in o.adapter.specs for s in spec.fields.values()]
    adapters = {s.path for s in sources if isinstance(s, TensorRef)}
    return [*sorted(adapters), *(shard.path for shard in base.checkpoint.shards)]


def _check_output_form(output: Path, base: OpenedBase) -> None:
    is_file = output.suffix == ".safetensors"
    if is_file == base.checkpoint.is_folder or (not is_file and output.suffix.lower() in FILES):
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


def _inputs(
    opened: Sequence[OpenedAdapter], base: OpenedBase, asked: MergeRequest
) -> dict[str, Any]:
    inputs: dict[str, Any] = {}
    files_of = adapter_id if asked.identify else adapter_sizes
    for one in opened:
        label = content_label(one.resolved, inputs)
        inputs[label] = {**one.weight.to_json(), "files": files_of(one.adapter)}
    label = content_label(base.resolved, inputs)
    inputs[label] = {"role": "base", "files": checkpoint_id(base.checkpoint, full=asked.checksum)}
    if asked.residual is not None and asked.identify:
        path = asked.residual.path
        label = free_label(path.name, inputs)
        inputs[label] = {"role": "residual", "files": {path.name: file_id(path)}}
    return inputs
