"""Plans around a residual: what TUNED has that a merge lacks, and putting it in again.

The table of a residual file::

    adapter   sha256 by file name of the adapter that it goes with
    bind      options that the merge needs: ``resize_embeddings``, ``untie``, ``keep_tied``
    config    values of TUNED's ``config.json`` that differ from the base's and follow the weights
    tensors   base-style checkpoint-wide name, in TUNED's order -> {"from", "dtype", "shape",
              "digest"}; from ``nothing``: the merge has no such tensor
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loratool.adapter import TensorRef
from loratool.archs.stated import WEIGHT_KEYS
from loratool.dtypes import DTYPES
from loratool.engine.rows import args_of, op_of
from loratool.errors import BadFileError, MismatchError
from loratool.frozen import Frozen, field, replace
from loratool.ops.align import align_names
from loratool.ops.merge import MergePlan
from loratool.options.groups import Names
from loratool.plan import Plan, ShardPlan, Step, TensorSpec
from loratool.store.checkpoint import Checkpoint
from loratool.store.patch_file import Config, Digest, Row, read_patches

_NEW = {"from": "nothing"}
_SUM = {"from": "sum", "rounding": "exact"}
_ELEMENTWISE = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")


class _Row(Row, frozen=True):
    digest: Digest


class _Table(Frozen):
    adapter: dict[str, Digest]
    bind: dict[str, bool]
    config: Config
    tensors: dict[str, _Row]


class ResidualTensor(Frozen):
    """What a residual file says of one tensor of TUNED.

    Attributes:
        output: its name in the checkpoint, type and shape.
        is_new: the merge has no such tensor, or one of another shape.
        digest: of its bits, block by block.
        patch: what the merge lacks of it, if anything.
    """

    output: TensorSpec
    is_new: bool
    digest: str
    patch: TensorRef | None


class Residual(Frozen):
    """A residual file, opened (no patches yet); see the table.

    Attributes:
        path: the file.
        tensors: name -> what TUNED has there.
        adapter: files that it goes with.
        bind: options.
        config: values.
        source: what keeps a file that lies elsewhere within reach.
    """

    path: Path
    tensors: Mapping[str, ResidualTensor]
    adapter: Mapping[str, str]
    bind: Mapping[str, bool] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    source: object = None


def read_residual(path: Path) -> Residual:
    """Open a residual file.

    Raises:
        BadFileError: not a residual file, of another version, or damaged.
    """
    found = read_patches(path, "residual", _Table)
    if found is None:
        raise BadFileError(
            "LT-398", "this is no residual file", file=path,
            hint="extract --save-residual writes one",
        )  # fmt: skip
    table = found.table
    for name, row in table.tensors.items():
        if row.dtype not in _ELEMENTWISE:
            raise BadFileError("LT-328", "damaged patch file", file=path, key=name,
                               expected=", ".join(_ELEMENTWISE), got=row.dtype)  # fmt: skip
    tensors = {
        name: ResidualTensor(
            TensorSpec(name, row.dtype, row.shape), row.how == "nothing", row.digest,
            found.patches.get(name),
        )
        for name, row in table.tensors.items()
    }  # fmt: skip
    config = {k: v for k, v in table.config.items() if k in WEIGHT_KEYS}
    return Residual(path, tensors, table.adapter, table.bind, config)


def residual_table(
    plan: Plan, results: Mapping[str, Any], **rest: Mapping[str, Any]
) -> dict[str, Any]:
    """The table of a residual file (see the module).

    Args:
        plan: of `plan_residual`.
        results: tensor -> `loratool.engine.patching.PatchResult`.
        rest: ``adapter``, ``bind`` and ``config``.
    """
    tensors = {
        s.output.name: {
            "from": args_of(s).how, "dtype": s.output.dtype, "shape": list(s.output.shape),
            "digest": results[s.output.name].wanted,
        }
        for s in plan.steps
    }  # fmt: skip
    return {**rest, "tensors": tensors}


def plan_residual(merge: Plan, base: Checkpoint, tuned: Checkpoint) -> Plan:
    """Compare what a merge gives, cast to TUNED's types, with TUNED: one step per tensor of it.

    Args:
        merge: the correctly rounded merge of the adapter into ``base``.
        base: its base.
        tuned: the fine-tune.

    Raises:
        MismatchError: a tensor whose bits cannot be compared.
    """
    merged = dict(zip(full_names(merge, base), merge.steps, strict=True))
    steps: list[Step] = []
    for name, ref in align_names(tuned, base).items():
        if ref.dtype not in _ELEMENTWISE:
            raise MismatchError(
                "LT-485", "a residual cannot hold tensors of this type", file=tuned.path,
                key=name, expected=", ".join(_ELEMENTWISE), got=ref.dtype,
            )  # fmt: skip
        step = merged.get(name)
        found = None if step is None else _compare(step, name, ref)
        if found is None:
            found = Step("make_patch", _spec(name, ref), (ref,), (1, ref.numel), args=_NEW)
        steps.append(found)
    return Plan("residual", tuple(steps))


def _spec(name: str, ref: TensorRef) -> TensorSpec:
    return TensorSpec(name, ref.dtype, ref.shape)


def _compare(step: Step, name: str, tuned: TensorRef) -> Step | None:
    """A step that compares, None where the merge is of no use."""
    if step.output.shape != tuned.shape:
        return None
    if op_of(step).moves_bytes and step.output.dtype == tuned.dtype:
        view = (1, tuned.numel)
        return Step("make_patch", _spec(name, tuned), (*step.inputs, tuned), view,
                    args={"from": "same"})  # fmt: skip
    if not all(DTYPES[d].is_mergeable for d in (step.inputs[0].dtype, tuned.dtype)):
        return None
    view = (1, tuned.numel) if op_of(step).moves_bytes else step.view
    return replace(
        step, op="make_patch", output=_spec(name, tuned), inputs=(*step.inputs, tuned),
        view=view, shard=-1, args={**_SUM, "gate": True},
    )  # fmt: skip


def full_names(plan: Plan, checkpoint: Checkpoint) -> list[str]:
    """Checkpoint-wide names of a merge's tensors (steps carry the name inside their file)."""
    prefixes = {s.name: s.prefix for s in checkpoint.shards}
    return [
        prefixes.get(plan.shards[step.shard].name, "") + step.output.name for step in plan.steps
    ]


def config_of(tuned: Checkpoint, base: Checkpoint) -> dict[str, Any]:
    """What TUNED's ``config.json`` says about its weights and the base's does not."""
    return {
        key: tuned.config[key]
        for key in WEIGHT_KEYS
        if key in tuned.config and tuned.config[key] != base.config.get(key)
    }


def patch_merge(merge: MergePlan, checkpoint: Checkpoint, residual: Residual) -> MergePlan:
    """Turn a correctly rounded merge into one that gives TUNED, every tensor checked.

    Args:
        merge: the plan.
        checkpoint: its base.
        residual: what the merge lacks.
    """
    names = full_names(merge.plan, checkpoint)
    groups: list[list[Step]] = [[] for _ in merge.plan.shards]
    for name, step in zip(names, merge.plan.steps, strict=True):
        entry = residual.tensors.get(name)
        if entry is not None:
            groups[step.shard].append(_patched(step, entry, name, residual.path))
    known, last = dict(zip(names, merge.plan.steps, strict=True)), len(groups) - 1
    for name, entry in residual.tensors.items():
        if name in known:
            continue
        if not entry.is_new:
            raise MismatchError(
                "LT-486", "the residual changes a tensor that the base has not", key=name,
                file=residual.path,
            )  # fmt: skip
        groups[last].append(_created(entry, name, last))
    filled = [(shard, g) for shard, g in zip(merge.plan.shards, groups, strict=True) if g]
    shards = tuple(
        ShardPlan(shard.name, tuple(s.output for s in g), shard.metadata) for shard, g in filled
    )
    steps = tuple(replace(s, shard=i) for i, (_, g) in enumerate(filled) for s in g)
    plan = replace(merge.plan, steps=steps, shards=shards)
    config = {**merge.config_changes, **residual.config}
    return replace(merge, plan=plan, config_changes=config, **_fates(merge, known, residual))


def _fates(merge: MergePlan, known: Mapping[str, Step], residual: Residual) -> dict[str, Any]:
    """What becomes of each tensor, once the residual is in."""
    found: dict[str, list[str]] = {"changed": [], "copied": [], "cast": [], "created": []}
    copied, cast = set(merge.copied), set(merge.cast)
    for name, entry in residual.tensors.items():
        if name not in known:
            fate = "created"
        elif entry.is_new or entry.patch is not None or name not in copied | cast:
            fate = "changed"
        else:
            is_cast = name in cast or known[name].output.dtype != entry.output.dtype
            fate = "cast" if is_cast else "copied"
        found[fate].append(name)
    return {fate: tuple(names) for fate, names in found.items()}


def _patched(step: Step, entry: ResidualTensor, name: str, file: Path) -> Step:
    if entry.is_new:
        return _created(entry, step.output.name, step.shard)
    types = (step.output.dtype, entry.output.dtype)
    is_alike = types[0] == types[1] or all(DTYPES[d].is_mergeable for d in types)
    if step.output.shape != entry.output.shape or not is_alike:
        raise MismatchError(
            "LT-486", "the residual is for a tensor of another form", file=file, key=name,
            expected=f"{types[0]} {list(step.output.shape)}",
            got=f"{types[1]} {list(entry.output.shape)}",
        )  # fmt: skip
    output = replace(entry.output, name=step.output.name)
    args: dict[str, Any] = {"wanted": entry.digest, "patch": entry.patch}
    if op_of(step).moves_bytes and step.output.dtype == output.dtype:
        args["from"] = "same"
    else:
        args |= _SUM
    view = (1, output.numel) if op_of(step).moves_bytes else step.view
    return replace(step, op="complete", output=output, view=view, args=args)


def _created(entry: ResidualTensor, name: str, shard: int) -> Step:
    """A tensor that is all in the patch."""
    output = replace(entry.output, name=name)
    args = {**_NEW, "wanted": entry.digest, "patch": entry.patch}
    return Step("complete", output, (), (1, output.numel), shard=shard, args=args)


def bind_options(options: Names, needed: Mapping[str, bool]) -> Names:
    """A user's options and those that a residual needs."""
    return options.replace(
        resize_embeddings=options.resize_embeddings or needed.get("resize_embeddings", False),
        untie=options.untie or needed.get("untie", False),
        keep_tied=options.keep_tied or needed.get("keep_tied", False),
    )


def check_adapter(residual: Residual, adapter: Mapping[str, str]) -> None:
    """Refuse another adapter than the one of the extraction, before any work.

    The base shows in the digests: it may be sharded otherwise by now.

    Args:
        residual: the file.
        adapter: sha256 by file name.

    Raises:
        MismatchError: its tensors differ.
    """
    want, have = ({v for k, v in i.items() if k.endswith(".safetensors")}
                  for i in (residual.adapter, adapter))  # fmt: skip
    if want != have:
        raise MismatchError(
            "LT-486", "the residual goes with another adapter", file=residual.path,
            expected=", ".join(sorted(v[:12] for v in want)),
            got=", ".join(sorted(v[:12] for v in have)),
        )  # fmt: skip
