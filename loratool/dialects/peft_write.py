"""PEFT adapters, written: keys and a configuration that PEFT loads to the exact result."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from loratool.adapter import Adapter, AdapterFiles, DeltaSpec, Replacement, Source
from loratool.dialects.peft_keys import PREFIX
from loratool.dialects.peft_specs import REGISTRATION_ORDER

PEFT_VERSION = "0.21.2"
"""The version whose rules the files follow; readers need it for the layout of experts."""

TENSOR_FILE = "adapter_model.safetensors"

_SUFFIXES = {
    "lora_A": ".lora_A.weight",
    "lora_B": ".lora_B.weight",
    "magnitude": ".lora_magnitude_vector",
    "diag": ".lora_diag",
}


def write(adapter: Adapter) -> AdapterFiles:
    """Spell an adapter for PEFT.

    An adapter that was read from PEFT keeps its keys, their order and its configuration; a new
    one gets a configuration made for it.
    """
    if adapter.config:
        return _rewritten(adapter)
    tensors: dict[str, Source] = {}
    mhas = _attention_modules(adapter.specs)
    targeted = {_wrapped_module(s, mhas) for s in adapter.specs}
    for spec in adapter.specs:
        head = PREFIX + _key_module(spec, adapter.specs, mhas)
        for role, source in spec.fields.items():
            tensors[head + _suffix(spec, role)] = source
    for item in adapter.replacements:
        tensors[PREFIX + _replacement_name(item, targeted, mhas)] = item.source
    config = new_config(
        adapter.specs,
        adapter.replacements,
        base_model=adapter.base_model,
        task_type=adapter.task_type,
    )
    ordered = tuple(sorted(tensors.items()))
    return AdapterFiles(ordered, {"format": "pt"}, TENSOR_FILE, {"adapter_config.json": config})


def _rewritten(adapter: Adapter) -> AdapterFiles:
    sources: list[Source] = [s for spec in adapter.specs for s in spec.fields.values()]
    sources += [r.source for r in adapter.replacements]
    sources += list(adapter.unclaimed)
    by_name = {s.name: s for s in sources}
    tensors = tuple((name, by_name[name]) for name in adapter.key_order)
    return AdapterFiles(
        tensors, adapter.metadata, TENSOR_FILE, {"adapter_config.json": dict(adapter.config)}
    )


def _suffix(spec: DeltaSpec, role: str) -> str:
    if spec.kind == "vector":
        return ".lora_B.bias"
    if spec.layout == "embedding" and role in ("lora_A", "lora_B"):
        return f".lora_embedding_{role[-1]}"
    return _SUFFIXES[role]


def _attention_modules(specs: Sequence[DeltaSpec]) -> set[str]:
    """nn.MultiheadAttention modules: PEFT wraps the module, not its projections."""
    return {s.module for s in specs if s.parameter == "in_proj_weight"}


def _wrapped_module(spec: DeltaSpec, mhas: set[str]) -> str:
    head = spec.module.removesuffix(".out_proj")
    return head if head != spec.module and head in mhas else spec.module


def _key_module(spec: DeltaSpec, specs: Sequence[DeltaSpec], mhas: set[str]) -> str:
    if spec.layout == "experts":
        outer = [s.parameter for s in specs if s.module == spec.module and s.layout == "experts"]
        ordered = sorted(outer, key=_registration)
        depth = len(ordered) - 1 - ordered.index(spec.parameter)
        return spec.module + ".base_layer" * depth
    wrapped = _wrapped_module(spec, mhas)
    return spec.module if wrapped == spec.module else f"{wrapped}.base_layer.out_proj"


def _registration(name: str) -> int:
    return REGISTRATION_ORDER.index(name) if name in REGISTRATION_ORDER else -1


def _replacement_name(item: Replacement, targeted: set[str], mhas: set[str]) -> str:
    module, _, parameter = item.name.rpartition(".")
    if item.origin != "bias":
        return item.name
    if module in targeted:
        return f"{module}.base_layer.{parameter}"
    head = module.removesuffix(".out_proj")
    if head != module and head in mhas:
        return f"{head}.base_layer.out_proj.base_layer.{parameter}"
    return item.name


def new_config(
    specs: Sequence[DeltaSpec],
    replacements: Sequence[Replacement],
    *,
    base_model: str | None,
    task_type: str | None = None,
) -> dict[str, Any]:
    """An ``adapter_config.json`` under which PEFT computes exactly these deltas.

    Ranks and alphas that differ from the commonest go into patterns with escaped full paths.
    """
    mhas = _attention_modules(specs)
    plain = [s for s in specs if s.kind != "vector"]
    modules = sorted({_wrapped_module(s, mhas) for s in plain if s.layout != "experts"})
    parameters = sorted({s.name for s in plain if s.layout == "experts"})
    ranks = {_pattern_path(s, mhas): s.rank for s in plain}
    alphas = {_pattern_path(s, mhas): _alpha(s, mhas) for s in plain}
    rank, alpha = _commonest(ranks.values(), 8), _commonest(alphas.values(), 8)
    saved = {r.name.rpartition(".")[0] for r in replacements if r.origin in ("modules_to_save", "")}
    return {
        "base_model_name_or_path": base_model,
        "bias": "all" if any(r.origin == "bias" for r in replacements) else "none",
        "fan_in_fan_out": any(s.transposed and s.layout == "linear" for s in plain),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_bias": any(s.kind == "vector" for s in specs),
        "lora_dropout": 0.0,
        "modules_to_save": sorted(saved) or None,
        "peft_type": "LORA",
        "peft_version": PEFT_VERSION,
        "r": rank,
        "rank_pattern": {_escape(p): r for p, r in sorted(ranks.items()) if r != rank},
        "alpha_pattern": {_escape(p): a for p, a in sorted(alphas.items()) if a != alpha},
        "target_modules": modules,
        "target_parameters": parameters or None,
        "task_type": task_type,
        "use_dora": any(s.kind == "dora" for s in specs),
        "use_rslora": False,
    }


def _pattern_path(spec: DeltaSpec, mhas: set[str]) -> str:
    return spec.name if spec.layout == "experts" else _wrapped_module(spec, mhas)


def _alpha(spec: DeltaSpec, mhas: set[str]) -> float | int:
    """Alpha that gives the scaling; PEFT itself doubles an attention's output projection."""
    doubled = _wrapped_module(spec, mhas) != spec.module
    alpha = spec.scaling * spec.rank / (2 if doubled else 1)
    return int(alpha) if alpha == int(alpha) else alpha


def _commonest(values: Any, default: int) -> Any:
    counted = Counter(values)
    return counted.most_common(1)[0][0] if counted else default


def _escape(path: str) -> str:
    return "^" + re.escape(path)
