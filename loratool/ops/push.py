"""What a push publishes: validated files and the facts of the model card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratool.adapter import Adapter, TensorRef
from loratool.dialects import open_adapter
from loratool.errors import LoratoolError, MismatchError
from loratool.ops.adapter_summary import summarize_adapter
from loratool.ops.summary import summarize, summarize_checkpoint
from loratool.store.adapter_folder import find_adapter
from loratool.store.card import CardFacts
from loratool.store.checkpoint import Checkpoint, open_checkpoint
from loratool.store.header import read_header
from loratool.store.jsonfile import load_json
from loratool.store.provenance import read_record
from loratool.store.push_files import Chosen, choose_files, is_hub_name, refuse_local_base


@dataclass(frozen=True)
class Publication:
    """What is published.

    Attributes:
        what: ``adapter`` or ``checkpoint``.
        chosen: the files.
        base: the base's name as the files say it, None if they do not.
        facts: for the model card.
        notes: what a user should know.
    """

    what: str
    chosen: Chosen
    base: str | None
    facts: CardFacts
    notes: tuple[str, ...] = ()


def prepare(path: Path, repo: str) -> Publication:
    """Validate an adapter or a checkpoint for publication; reads every value.

    Raises:
        LoratoolError: it cannot be opened, its configuration contradicts its tensors, a value is
            not finite (LT-801), or a file must not be published (LT-930, LT-931, LT-932).
    """
    what = summarize(path).what
    if what == "folder":
        raise MismatchError(
            "LT-491", "this folder is neither an adapter nor a checkpoint itself", file=path,
            hint="push one of the models in it",
        )  # fmt: skip
    return _adapter(path, repo) if what == "adapter" else _checkpoint(path, repo)


def _adapter(path: Path, repo: str) -> Publication:
    from loratool.engine.finite import check_finite

    adapter = open_adapter(find_adapter(path))
    chosen = choose_files(path)
    refuse_local_base(adapter.base_model, path / "adapter_config.json")
    check_finite(_refs(chosen))
    base, notes = _named(adapter.base_model)
    return Publication("adapter", chosen, adapter.base_model, _facts(adapter, repo, base), notes)


def _checkpoint(path: Path, repo: str) -> Publication:
    from loratool.engine.finite import check_finite

    checkpoint = open_checkpoint(path)
    chosen = choose_files(path, _sub_folders(checkpoint))
    for file in chosen.files.values():
        if file.name == "config.json":
            refuse_local_base(load_json(file).get("_name_or_path"), file)
    check_finite(_refs(chosen))
    record = read_record(checkpoint) or {}
    named = checkpoint.config.get("_name_or_path")
    base, notes = _named(named if isinstance(named, str) and named else None)
    summary = summarize_checkpoint(checkpoint)
    facts = {
        "method": "merged model" if record else "model",
        "parameters": f"{summary.parameters:,}",
        "types": ", ".join(summary.dtypes),
        "shards": str(summary.shards),
    }
    library = "diffusers" if checkpoint.components else "transformers"
    usage = (
        (("Use", "python", f"from transformers import AutoModelForCausalLM\n\n"
          f'model = AutoModelForCausalLM.from_pretrained("{repo}")'),)
        if _is_causal(checkpoint) else ()
    )  # fmt: skip
    card = CardFacts(
        repo, "merge", base, None, library, tags=("merge", "loratool") if record else (),
        pipeline="text-generation" if _is_causal(checkpoint) else None,
        facts={k: v for k, v in facts.items() if v}, made=_made(record), usage=usage,
    )  # fmt: skip
    return Publication("checkpoint", chosen, base, card, notes)


def _sub_folders(checkpoint: Checkpoint) -> tuple[str, ...]:
    """All folders of a pipeline: its tokenizer and scheduler hold no weights."""
    if not checkpoint.components:
        return ()
    listed = load_json(checkpoint.path / "model_index.json")
    inside = sorted(e.name for e in checkpoint.path.iterdir() if e.is_dir())
    return tuple(name for name in inside if isinstance(listed.get(name), list))


def _refs(chosen: Chosen) -> list[TensorRef]:
    weights = [p for n, p in chosen.files.items() if n.endswith(".safetensors")]
    return [ref for path in weights for ref in read_header(path).tensors]


def _named(name: str | None) -> tuple[str | None, tuple[str, ...]]:
    """The base if it can stand in a card, and a note if it cannot."""
    if name is None:
        return None, ("the files name no base model, so the card names none",)
    if is_hub_name(name):
        return name, ()
    return None, ("the base's name cannot be one of the Hub, so the card leaves it out",)


def _is_causal(checkpoint: Checkpoint) -> bool:
    names = checkpoint.config.get("architectures")
    return isinstance(names, list) and any(str(n).endswith("ForCausalLM") for n in names)


def _facts(adapter: Adapter, repo: str, base: str | None) -> CardFacts:
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
    modules = tuple((f.name, str(f.modules), _listed(f.ranks)) for f in summary.families)
    causal = adapter.config.get("task_type") == "CAUSAL_LM"
    revision = adapter.config.get("revision")
    is_peft = adapter.dialect == "peft"
    tags = [
        *([f"base_model:adapter:{base}"] if base else []),
        "lora",
        *(["peft"] if is_peft else []),
    ]
    return CardFacts(
        repo, "adapter", base, revision if isinstance(revision, str) and revision else None,
        "peft" if is_peft else "diffusers", tags=tuple(tags),
        pipeline="text-generation" if causal else None,
        facts={k: v for k, v in rows.items() if v}, modules=modules,
        made=_made(_record_of(adapter)), usage=tuple(_usage(adapter, repo, base, causal=causal)),
    )  # fmt: skip


def _usage(
    adapter: Adapter, repo: str, base: str | None, *, causal: bool
) -> list[tuple[str, str, str]]:
    if adapter.dialect != "peft":
        code = f'pipe.load_lora_weights("{repo}")'
        return [("Use with diffusers", "python", code)]
    kind = "AutoModelForCausalLM" if causal else "AutoModel"
    code = (
        f"from peft import PeftModel\nfrom transformers import {kind}\n\n"
        f'base = {kind}.from_pretrained("{base or "BASE"}")\n'
        f'model = PeftModel.from_pretrained(base, "{repo}")'
    )
    found = [("Use with PEFT", "python", code)]
    loads = {row.program: row.verdict for row in summarize_adapter(adapter).loads}
    if base and causal and loads.get("vLLM") == "yes":
        ranks = [spec.rank for spec in adapter.specs]
        short = repo.rpartition("/")[2]
        code = (
            f"vllm serve {base} --enable-lora --max-lora-rank {_vllm_rank(max(ranks, default=1))} "
            f"--lora-modules {short}={repo}"
        )
        found.append(("Use with vLLM", "console", code))
    merge = f"loratool merge {repo} --base {base or 'BASE'} -o merged"
    return [*found, ("Merge into the base", "console", merge)]


def _vllm_rank(rank: int) -> int:
    """The least limit that vLLM takes and that is enough."""
    return next((r for r in (8, 16, 32, 64, 128, 256, 320, 512) if r >= rank), rank)


def _listed(counts: Mapping[int, int]) -> str:
    few = sorted(counts)
    return ", ".join(map(str, few)) if len(few) <= 6 else f"{few[0]} to {few[-1]}"


def _record_of(adapter: Adapter) -> dict[str, Any]:
    folder = adapter.path if adapter.path.is_dir() else adapter.path.parent
    try:
        return load_json(folder / "loratool.json")
    except LoratoolError:
        return {}


def _made(record: Mapping[str, Any]) -> str | None:
    operation, version = record.get("operation"), record.get("loratool")
    if not isinstance(operation, str) or not isinstance(version, str):
        return None
    options = record.get("options")
    shown = ", ".join(
        f"{k} {v}" for k, v in (options.items() if isinstance(options, Mapping) else ())
        if isinstance(v, str | int | float) and not isinstance(v, bool)
    )  # fmt: skip
    tail = "; inputs and options are in loratool.json"
    return f"loratool {version} {operation}{f' with {shown}' if shown else ''}{tail}"
