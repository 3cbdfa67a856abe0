"""Plan undo patches: what to predict each base tensor from, and how to put it back.

The table of an undo file::

    plan            identity of the merge's plan
    block_elements  block size of the digests' grid
    adapters        [{"weight", "files": name -> sha256, "modules": digest of weights per module,
                    where there are some}] in order
    config          dotted key of config.json -> value in the base, null = absent
    tensors         name -> {"from", "dtype", "shape", "view", "base", "merged"}
    created         tensors that the base has not
    kept            name -> {"dtype", "shape", "crc32"} of all others: the merge left them alone
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from loratool.adapter import Adapter, TensorRef
from loratool.engine.rows import args_of, op_of
from loratool.errors import BadFileError, MismatchError
from loratool.frozen import Frozen, asdict, replace
from loratool.ops.weights import Weight
from loratool.plan import DeltaPart, Part, Plan, ShardPlan, Step, TensorSpec
from loratool.store.checkpoint import Checkpoint
from loratool.store.patch_file import Config, Digest, PatchFile, Row, Shape, read_patches
from loratool.store.provenance import adapter_id
from loratool.store.tensor_sums import sum_tensors

_ARGS = {"rounding": "exact"}
_Size = Annotated[int, Meta(ge=0, lt=1 << 56)]


class UndoRow(Row, frozen=True):
    """How a base tensor comes back; the digests are of it and of the merged one."""

    view: tuple[_Size, _Size]
    base: Digest
    merged: Digest


class KeptRow(Frozen):
    """What a tensor is that the merge left alone."""

    dtype: str
    shape: Shape
    crc32: Annotated[str, Meta(max_length=8)]


class MergedAdapter(Frozen):
    """An adapter that was merged; see the table."""

    files: dict[str, Digest]
    weight: float
    modules: Digest = ""


class UndoTable(Frozen):
    """See the module; early versions did not say what was ``kept``."""

    block_elements: Annotated[int, Meta(ge=1 << 16, le=1 << 26)]
    adapters: tuple[MergedAdapter, ...]
    config: Config
    created: frozenset[str]
    tensors: dict[str, UndoRow]
    kept: dict[str, KeptRow] | None = None


class Patches(Frozen):
    """What an undo file will hold.

    Attributes:
        plan: of the patches.
        created: tensors that the merge creates.
        kept: tensors that it leaves alone, where they lie in the merged weights.
    """

    plan: Plan
    created: tuple[str, ...]
    kept: Mapping[str, TensorRef]


UndoFile = PatchFile[UndoTable]


def read_undo(path: Path) -> UndoFile:
    """Open an undo file.

    Raises:
        BadFileError: damaged, or not an undo file.
    """
    found = read_patches(path, "undo", UndoTable)
    if found is None:
        raise BadFileError(
            "LT-329", "not an undo file", file=path, hint="merge --save-undo FILE writes one"
        )
    return found


def plan_patches(
    merge: Plan, names: Mapping[int, str], base: Checkpoint, merged: Mapping[int, TensorRef]
) -> Patches:
    """Plan the patches of a merge: one step per base tensor that it changes.

    Args:
        merge: the merge's plan.
        names: position of a step -> checkpoint-wide name of its tensor.
        base: the base.
        merged: position of a step -> where its output lies.
    """
    steps: list[Step] = []
    created: list[str] = []
    kept: dict[str, TensorRef] = {}
    for index, step in enumerate(merge.steps):
        name = names[index]
        ref = base.tensors.get(name)
        if ref is None:
            created.append(name)
        elif not op_of(step).moves_bytes or step.inputs[0] != ref:
            steps.append(_patch_step(step, name, ref, merged[index]))
        else:
            kept[name] = merged[index]
    return Patches(Plan("save-undo", tuple(steps)), tuple(created), kept)


def _patch_step(step: Step, name: str, base: TensorRef, merged: TensorRef) -> Step:
    output = TensorSpec(name, base.dtype, base.shape)
    alike = (merged.dtype, merged.shape) == (base.dtype, base.shape)
    if alike and step.inputs == (base,) and all(_is_sum(p) for p in step.parts):
        parts = _taken_out(step.parts)
        return Step("make_patch", output, (merged, base), step.view, parts, -1,
                    {**_ARGS, "from": "sum", "source": True})  # fmt: skip
    view = (1, base.numel)
    if alike:
        args = {"from": "same", "source": True}
        return Step("make_patch", output, (merged, base), view, args=args)
    return Step("make_patch", output, (base,), view, args={"from": "nothing"})


def _is_sum(part: Part) -> bool:
    """True for what `subtract` plans as a sum too: it takes nothing out at weight 0."""
    return isinstance(part, DeltaPart) and part.spec.is_additive and part.weight != 0


def _taken_out(parts: Sequence[Part]) -> tuple[Part, ...]:
    return tuple(replace(p, weight=-p.weight) for p in parts)


def undo_table(
    patches: Patches, merge_id: str, results: Mapping[str, Any], elements: int,
    adapters: Sequence[tuple[Adapter, Weight]], config: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """The table of an undo file (see the module).

    Args:
        patches: of `plan_patches`; what it keeps is read.
        merge_id: identity of the merge's plan.
        results: tensor -> `loratool.engine.patching.PatchResult`.
        elements: block size of the grid that the digests were taken on.
        adapters: merged, with weights.
        config: dotted key -> value in the base's config.json, None = absent.
    """
    return {
        "plan": merge_id,
        "block_elements": elements,
        "adapters": [_row(a, w) for a, w in adapters],
        "config": dict(config),
        "created": sorted(patches.created),
        "kept": {name: asdict(row) for name, row in kept_rows(patches.kept).items()},
        "tensors": {
            s.output.name: {
                "from": args_of(s).how,
                "dtype": s.output.dtype,
                "shape": list(s.output.shape),
                "view": list(s.view),
                "base": results[s.output.name].wanted,
                "merged": results[s.output.name].source,
            }
            for s in patches.plan.steps
        },
    }


def check_adapters(undo: UndoFile, adapters: Sequence[tuple[Adapter, Weight]]) -> None:
    """Refuse other adapters or weights than those that were merged.

    Raises:
        MismatchError: they differ.
    """
    want = sorted(map(_identity, undo.table.adapters))
    given = sorted(_identity(_merged(a, w)) for a, w in adapters)
    if want != given:
        raise MismatchError(
            "LT-452", "the undo file was made for other adapters or weights", file=undo.path,
            expected=", ".join(_words(w) for w in want), got=", ".join(_words(g) for g in given),
        )  # fmt: skip


def _row(adapter: Adapter, weight: Weight) -> dict[str, Any]:
    one = _merged(adapter, weight)
    modules = {"modules": one.modules} if one.modules else {}
    return {**weight.to_json(), "files": one.files, **modules}


def _merged(adapter: Adapter, weight: Weight) -> MergedAdapter:
    text = json.dumps(sorted(weight.by_name.items()))
    modules = hashlib.sha256(text.encode()).hexdigest()[:16] if weight.by_name else ""
    return MergedAdapter(adapter_id(adapter), weight.to_json()["weight"], modules)


def _identity(row: MergedAdapter) -> tuple[Any, ...]:
    files = sorted(v for k, v in row.files.items() if k.endswith(".safetensors"))
    return files, row.weight, row.modules


def _words(identity: tuple[Any, ...]) -> str:
    files, weight, modules = identity
    own = f" with weights {modules[:6]} per module" if modules else ""
    return "+".join(f[:12] for f in files) + f":{weight:g}{own}"


def kept_rows(refs: Mapping[str, TensorRef]) -> dict[str, KeptRow]:
    """What tensors are; all of them are read."""
    sums = sum_tensors(refs)
    return {name: KeptRow(ref.dtype, ref.shape, sums[name]) for name, ref in refs.items()}


def check_kept(refs: Mapping[str, TensorRef], merged: Path, undo: UndoFile) -> None:
    """Refuse merged weights whose other tensors are not the base's either; they are read.

    Args:
        refs: tensors of the merged weights that would be copied.
        merged: the weights.
        undo: of the merge.

    Raises:
        MismatchError: one is missing, another, or nothing that the base has.
    """
    kept = undo.table.kept
    if kept is None:
        return
    if refs.keys() != kept.keys():
        odd = refs.keys() ^ kept.keys()
        raise MismatchError(
            "LT-453", "the merged checkpoint has other tensors than the undo file",
            file=merged, key=min(odd), got=f"{len(odd)} added or missing",
            hint="the merged weights changed since, or are another model",
        )  # fmt: skip
    differing = [name for name, row in kept_rows(refs).items() if row != kept[name]]
    if differing:
        raise MismatchError(
            "LT-450", "this tensor is not the one that the undo file was made for", file=merged,
            key=min(differing), got=f"{len(differing)} that the merge had left alone",
            hint="the merged weights changed since, or are another model",
        )  # fmt: skip


def plan_restore(
    subtract: Plan, names: Mapping[int, str], merged: Checkpoint, undo: UndoFile
) -> Plan:
    """Turn a plan that takes adapters out into one that gives the base back bit for bit.

    Args:
        subtract: plan of the subtraction; its steps know the deltas of each tensor.
        names: position of a step -> checkpoint-wide name of its tensor.
        merged: what it reads.
        undo: patches and table.

    Raises:
        MismatchError: the undo file is for other tensors.
    """
    table, created = undo.table.tensors, undo.table.created
    missing = sorted(table.keys() - set(names.values()))
    if missing:
        raise MismatchError(
            "LT-453", "the merged checkpoint lacks tensors that the undo file restores",
            file=merged.path, key=missing[0], got=f"{len(missing)} missing",
        )  # fmt: skip
    steps = []
    for index, step in enumerate(subtract.steps):
        name = names[index]
        if name in created:
            continue
        row = table.get(name)
        if row is not None:
            steps.append(_restore_step(step, merged.tensors[name], row, undo, name))
        elif op_of(step).moves_bytes:
            steps.append(step)
        else:
            raise MismatchError(
                "LT-453", "the undo file has no patch for a tensor that the adapters change",
                file=undo.path, key=name,
                hint="give --skip, --rename and the like as the merge had them",
            )  # fmt: skip
    left = {(s.shard, s.output.name) for s in steps}
    outputs = {(s.shard, s.output.name): s.output for s in steps}
    shards = tuple(_reshape(s, i, left, outputs) for i, s in enumerate(subtract.shards))
    return replace(subtract, steps=tuple(steps), shards=shards)


def _restore_step(step: Step, merged: TensorRef, row: UndoRow, undo: UndoFile, name: str) -> Step:
    output = TensorSpec(step.output.name, row.dtype, row.shape)
    args = {"from": row.how, "patch": undo.patches.get(name), "wanted": row.base,
            "source": row.merged}  # fmt: skip
    sound = row.view[0] * row.view[1] == output.numel
    if row.how != "nothing":
        sound &= (merged.dtype, merged.shape) == (row.dtype, row.shape)
    if row.how == "sum":
        sound &= row.view == step.view and step.inputs == (merged,)
    if not sound:
        raise MismatchError(
            "LT-453", "the undo file is for a tensor of another form", file=undo.path, key=name,
            expected=f"{row.dtype} {list(row.shape)}", got=f"{merged.dtype} {list(merged.shape)}",
        )  # fmt: skip
    if row.how == "sum":
        return replace(step, op="restore", output=output, args={**_ARGS, **args})
    inputs = () if row.how == "nothing" else (merged,)
    return Step("restore", output, inputs, row.view, shard=step.shard, args=args)


def _reshape(
    shard: ShardPlan, index: int, left: set[tuple[int, str]],
    outputs: Mapping[tuple[int, str], TensorSpec],
) -> ShardPlan:  # fmt: skip
    tensors = tuple(outputs[index, t.name] for t in shard.tensors if (index, t.name) in left)
    if tensors == shard.tensors:
        return shard
    return replace(shard, tensors=tensors, header=None, twin=None)
