"""What a model card says, from headers, configurations and provenance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loratool.adapter import Adapter
from loratool.archs.stated import is_causal, name_of
from loratool.dialects.rules import library_of
from loratool.dialects.stated import revision_of
from loratool.dialects.usage import (
    PLAIN,
    Usage,
    checkpoint_library,
    checkpoint_usage,
    pipeline_of,
    tags_of,
    usage_of,
)
from loratool.errors import LoratoolError
from loratool.frozen import Frozen
from loratool.lazy import regex
from loratool.ops.adapter_summary import summarize_adapter
from loratool.ops.summary import summarize_checkpoint
from loratool.store.card import CardFacts
from loratool.store.checkpoint import Checkpoint
from loratool.store.jsonfile import load_json
from loratool.store.provenance import read_record
from loratool.store.push_files import is_hub_name

_PINNED = regex(r"hf://(?P<repo>[^/@]+/[^/@]+)@(?P<commit>[0-9a-f]{40})(/.*)?")
_MERGES = ("merge", "swap")  # operations after which adapters are in the weights


class Origin(Frozen):
    """What an output's own provenance says.

    Attributes:
        operation: command that made it, "" if nothing says.
        base: the base's name on the Hub, None if it was a local folder or is not recorded.
        revision: its commit.
        made: how it was made, one sentence; None if nothing says.
        inputs: from what.
    """

    operation: str = ""
    base: str | None = None
    revision: str | None = None
    made: str | None = None
    inputs: tuple[str, ...] = ()


def read_origin(record: Mapping[str, Any]) -> Origin:
    """Take ``loratool.json`` apart; whatever is not as loratool writes it is left out."""
    operation, version = record.get("operation"), record.get("loratool")
    if not isinstance(operation, str) or not isinstance(version, str):
        return Origin()
    inputs, options = (
        {k: v for k, v in part.items() if isinstance(k, str)} if isinstance(part, Mapping) else {}
        for part in (record.get("inputs"), record.get("options"))
    )
    row = inputs.get("base")  # of a command whose output is no merge into it
    if isinstance(row, Mapping) and isinstance(row.get("name"), str):
        inputs = {k: v for k, v in inputs.items() if k != "base"}
        inputs[row["name"]] = {"role": "base"}
    bases = [k for k, v in inputs.items() if isinstance(v, Mapping) and v.get("role") == "base"]
    pinned = _PINNED.fullmatch(bases[0]) if bases else None
    shown = ", ".join(
        f"{k} {v}" for k, v in options.items()
        if isinstance(v, str | int | float) and not isinstance(v, bool)
    )  # fmt: skip
    made = f"loratool {version} {operation}" + (f" with {shown}" if shown else "")
    return Origin(
        operation, pinned["repo"] if pinned else None, pinned["commit"] if pinned else None, made,
        tuple(_input(k, v) for k, v in inputs.items()),
    )  # fmt: skip


def _input(label: str, row: object) -> str:
    """An input with its role or weight."""
    facts = row if isinstance(row, Mapping) else {}
    role, weight = facts.get("role"), facts.get("weight")
    if isinstance(role, str):
        return f"{label} ({role})"
    return f"{label} (weight {weight:g})" if isinstance(weight, int | float) else label


def checkpoint_facts(checkpoint: Checkpoint, repo: str) -> CardFacts:
    """The card of a checkpoint; one that loratool merged says so, any other claims nothing."""
    origin = read_origin(read_record(checkpoint) or {})
    base = origin.base or _hub_name(name_of(checkpoint.config))
    base = None if base == repo else base
    is_merge = origin.operation in _MERGES
    summary = summarize_checkpoint(checkpoint)
    causal, is_pipeline = is_causal(checkpoint.config), bool(checkpoint.components)
    facts = {
        "method": "merged model" if is_merge else "model",
        "parameters": f"{summary.parameters:,}",
        "types": ", ".join(summary.dtypes),
        "shards": str(summary.shards),
    }
    return CardFacts(
        repo, "merge" if is_merge else None, base, origin.revision if base == origin.base else None,
        checkpoint_library(is_pipeline=is_pipeline),
        tags=("merge", "loratool") if is_merge else (),
        pipeline="text-generation" if causal else None,
        facts={k: v for k, v in facts.items() if v}, made=origin.made, inputs=origin.inputs,
        usage=checkpoint_usage(repo, is_pipeline=is_pipeline, is_causal=causal),
    )  # fmt: skip


def adapter_facts(adapter: Adapter, repo: str) -> CardFacts:
    """The card of an adapter: base and revision by its configuration, else by its provenance."""
    origin = read_origin(_record_of(adapter))
    base = _hub_name(adapter.base_model) or origin.base
    revision = revision_of(adapter) if base == adapter.base_model else None
    if revision is None or not PLAIN.fullmatch(revision):
        revision = origin.revision if base == origin.base else None
    summary = summarize_adapter(adapter)
    rows = {
        "method": summary.method,
        "modules": f"{summary.modules}",
        "ranks": _listed(summary.ranks),
        "scaling": ", ".join(summary.scalings),
        "parameters": f"{summary.parameters:,}",
        "types": ", ".join(summary.dtypes),
        "replaced tensors": str(len(summary.replaced)) if summary.replaced else "",
    }
    library = library_of(adapter)
    tags = [
        *([f"base_model:adapter:{base}"] if base else []),
        "lora",
        *tags_of(adapter),
    ]
    return CardFacts(
        repo, "adapter", base, revision, library, tags=tuple(tags),
        pipeline=pipeline_of(adapter), facts={k: v for k, v in rows.items() if v},
        modules=tuple((f.name, str(f.modules), _listed(f.ranks)) for f in summary.families),
        made=origin.made, inputs=origin.inputs, usage=tuple(_usage(adapter, repo, base, revision)),
    )  # fmt: skip


def _usage(adapter: Adapter, repo: str, base: str | None, revision: str | None) -> list[Usage]:
    """How to use it in the programs that load it as it is, and how to merge it."""
    shown = base or "BASE"
    pinned = f"{shown}@{revision}" if base and revision else shown
    merge = f"loratool merge {repo} --base {pinned} -o merged"
    return [*usage_of(adapter, repo, base, revision), ("Merge into the base", "console", merge)]


def _hub_name(name: object) -> str | None:
    return name if isinstance(name, str) and name and is_hub_name(name) else None


def _listed(counts: Mapping[int, int]) -> str:
    few = sorted(counts)
    return ", ".join(map(str, few)) if len(few) <= 6 else f"{few[0]} to {few[-1]}"


def _record_of(adapter: Adapter) -> dict[str, Any]:
    folder = adapter.path if adapter.path.is_dir() else adapter.path.parent
    try:
        return load_json(folder / "loratool.json")
    except LoratoolError:
        return {}
