"""Into which files the tensors of an output go."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from loratool.adapter import TensorRef
from loratool.engine.rows import op_of
from loratool.errors import MismatchError
from loratool.frozen import replace
from loratool.lazy import regex
from loratool.plan import Plan, ShardPlan, Step
from loratool.store.checkpoint import Checkpoint, Shard

_SHARD_NUMBER = regex(r"-\d{5}-of-\d{5}(?=\.safetensors$)")


def file_name_of(name: str, ref: TensorRef, checkpoint: Checkpoint) -> str:
    """What a tensor is called in its file: without the component's prefix."""
    if not checkpoint.components:
        return name
    prefix = next(s.prefix for s in checkpoint.shards if s.path == ref.path)
    return name.removeprefix(prefix)


def in_shards(
    steps: Mapping[str, Step], checkpoint: Checkpoint, shard_bytes: int | None,
    file_metadata: Mapping[str, str] | None,
) -> tuple[tuple[Step, ...], tuple[ShardPlan, ...]]:  # fmt: skip
    """The steps in the order of the files that they fill, and these.

    Args:
        steps: by checkpoint-wide names.
        checkpoint: the base.
        shard_bytes: largest file; None keeps the base's.
        file_metadata: entries that are added to the header of a file.

    Raises:
        MismatchError: LT-472.
    """
    groups = [(shard, name, [steps[tensor] for tensor in names])
              for shard, name, names in _group(steps, checkpoint, shard_bytes)]  # fmt: skip
    shards = tuple(_make_shard(*one, file_metadata) for one in groups)
    ordered = (replace(s, shard=i) for i, (_, _, inside) in enumerate(groups) for s in inside)
    return tuple(ordered), shards


_Group = tuple[Shard, str, list[str]]


def _group(
    steps: Mapping[str, Step], checkpoint: Checkpoint, shard_bytes: int | None
) -> list[_Group]:
    """Output files: (input shard they stem from, name, checkpoint-wide tensor names)."""
    home: dict[Path, list[str]] = {s.path: [] for s in checkpoint.shards}
    last = checkpoint.shards[-1].path
    for name in steps:
        ref = checkpoint.tensors.get(name)
        home[ref.path if ref is not None and ref.path in home else last].append(name)
    if shard_bytes is None:
        return [(s, s.name, home[s.path]) for s in checkpoint.shards]
    if checkpoint.components:
        raise MismatchError(
            "LT-472", "--shard-size does not apply to a pipeline", file=checkpoint.path,
            hint="merge one component folder at a time",
        )  # fmt: skip
    runs: list[list[str]] = []
    size = 0
    for name in (n for names in home.values() for n in names):
        nbytes = steps[name].output.nbytes
        if not runs or size + nbytes > shard_bytes:
            runs.append([])
            size = 0
        runs[-1].append(name)
        size += nbytes
    stem = _stem(checkpoint)
    first = checkpoint.shards[0]
    if len(runs) == 1:
        return [(first, f"{stem}.safetensors", runs[0])]
    if not checkpoint.is_folder:
        raise MismatchError(
            "LT-472", "--shard-size does not apply to a model in one file", file=checkpoint.path,
            hint="leave it out: the output has the form of the base",
        )  # fmt: skip
    return [
        (first, f"{stem}-{i:05d}-of-{len(runs):05d}.safetensors", names)
        for i, names in enumerate(runs, 1)
    ]


def _stem(checkpoint: Checkpoint) -> str:
    return _SHARD_NUMBER.sub("", checkpoint.shards[0].name).removesuffix(".safetensors")


def index_files(plan: Plan, checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """Index files (path -> object) of a sharded output, with the true ``total_size``."""
    if not checkpoint.is_folder:
        return {}
    folders: dict[str, list[ShardPlan]] = {}
    for shard in plan.shards:
        folders.setdefault(str(PurePosixPath(shard.name).parent), []).append(shard)
    found: dict[str, dict[str, Any]] = {}
    for folder, shards in folders.items():
        if len(shards) == 1 and not (checkpoint.index_name and not checkpoint.components):
            continue
        stem = _SHARD_NUMBER.sub("", PurePosixPath(shards[0].name).name)
        name = f"{stem.removesuffix('.safetensors')}.safetensors.index.json"
        weight_map = {t.name: PurePosixPath(s.name).name for s in shards for t in s.tensors}
        size = sum(t.nbytes for s in shards for t in s.tensors)
        found[name if folder == "." else f"{folder}/{name}"] = {
            "metadata": {"total_size": size},
            "weight_map": dict(sorted(weight_map.items())),
        }
    return found


def _make_shard(
    shard: Shard, name: str, steps: list[Step], file_metadata: Mapping[str, str] | None
) -> ShardPlan:
    """One output file; one that is its input's keeps that one's header.

    Args:
        shard: of the base, that it stems from.
        name: of the file.
        steps: its tensors.
        file_metadata: entries that are added.
    """
    tensors = tuple(s.output for s in steps)
    kept = {k: v for k, v in shard.metadata.items() if k != "loratool"}  # it speaks of the input
    metadata = {**kept, **(file_metadata or {})}
    own = [s.inputs[0] for s in steps if isinstance(s.inputs[0], TensorRef)]
    is_same = (
        not file_metadata
        and name == shard.name
        and len(own) == len(steps) == len(shard.keys)
        and all(
            type(ref) is TensorRef
            and ref.path == shard.path
            and (ref.name, ref.dtype, ref.shape) == (t.name, t.dtype, t.shape)
            for ref, t in zip(own, tensors, strict=True)
        )
    )
    if is_same and all(op_of(s).moves_bytes for s in steps):
        return ShardPlan(name, tensors, metadata, shard.header, shard.path)
    return ShardPlan(name, tensors, metadata)
