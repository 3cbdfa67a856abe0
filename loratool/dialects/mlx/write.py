"""Write mlx-lm's adapters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from loratool.adapter import Adapter, AdapterFiles, DeltaSpec, Source, TensorData
from loratool.dialects.arranged import arranged
from loratool.dialects.candidate import CONFIG_NAME
from loratool.dialects.factors import beyond_pairs
from loratool.dialects.mlx import LETTERS, NAME, ROLES, WEIGHTS
from loratool.dtypes import tensor_bytes
from loratool.errors import MismatchError, list_some
from loratool.frozen import replace
from loratool.lazy import regex
from loratool.store.reader import read_bytes

_LEAVES = {role: leaf for leaf, role in ROLES.items()}
_WORDS = {letter: word for word, letter in LETTERS.items()}
_LAYER = regex(r"(?P<layers>(?:.+\.)?layers)\.(?P<number>\d+)\.(?P<rest>.+)", re.DOTALL)
_INSIDE, _AS_IN_MODEL = "model.language_model.", ("gemma3n", "muse_spark")
_EXPERT = regex(r"(?P<mlp>.+)\.experts\.(?P<number>\d+)\.(?P<leaf>\w+)", re.DOTALL)


def obstacle(spec: DeltaSpec) -> str:
    """What of a change mlx-lm has no place for, "" if there is nothing."""
    is_expert = _EXPERT.fullmatch(spec.module) is not None
    reasons = {
        f"a {spec.title}": spec.kind not in ("lowrank", "dora"),
        **beyond_pairs(spec),
        "DoRA of an embedding or of experts": spec.kind == "dora"
        and (is_expert or spec.layout == "embedding"),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def write(
    adapter: Adapter,
    *,
    base_config: Mapping[str, Any] | None = None,
    base_tensors: Iterable[str] = (),
) -> AdapterFiles:
    """The files of an adapter in mlx-lm's form.

    Raises:
        MismatchError: LT-411, LT-412, mlx-lm cannot hold it.
    """
    _check(adapter)
    adapter = _named(adapter, base_config or {})
    rank = max(spec.rank for spec in adapter.specs)
    tensors: dict[str, Source] = {}
    experts: dict[str, dict[int, DeltaSpec]] = {}
    for spec in adapter.specs:
        if match := _EXPERT.fullmatch(spec.module):
            leaf = _WORDS.get(match["leaf"], match["leaf"])
            experts.setdefault(f"{match['mlp']}.switch_mlp.{leaf}", {})[int(match["number"])] = spec
            continue
        for role, source in spec.fields.items():
            flat = source if role == "magnitude" else _turned(source, role, rank)
            tensors[f"{spec.module}.{_LEAVES[role]}"] = flat
    for module, found in experts.items():
        tensors |= _stacked(module, found, rank, adapter)
    names = {name.rpartition(".")[0] for name in tensors}
    config = _config(adapter, names, base_config or {})
    return AdapterFiles(tuple(sorted(tensors.items())), {}, WEIGHTS, {CONFIG_NAME: config})


def _named(adapter: Adapter, base_config: Mapping[str, Any]) -> Adapter:
    """With the names that mlx-lm has where the text of a model of images lies deeper inside."""
    is_inside = "text_config" in base_config
    is_inside |= any(s.module.startswith(_INSIDE) for s in adapter.specs)
    if not is_inside or base_config.get("model_type") in _AS_IN_MODEL:
        return adapter
    specs = (replace(s, module=_inside(s.module)) for s in adapter.specs)
    return replace(adapter, specs=tuple(specs))


def _inside(module: str) -> str:
    if module.startswith(_INSIDE):
        return f"language_model.model.{module.removeprefix(_INSIDE)}"
    is_text = module == "lm_head" or module.startswith(("model.layers.", "model.embed_tokens"))
    return f"language_model.{module}" if is_text else module


def _check(adapter: Adapter) -> None:
    problems = [(s.name, why) for s in adapter.specs if (why := obstacle(s))]
    problems += [(r.name, "a replaced tensor") for r in adapter.replacements]
    kinds = {s.kind for s in adapter.specs}
    forms = {s.scaling for s in adapter.specs}
    if not problems and (len(kinds) > 1 or len(forms) > 1 or not adapter.specs):
        why = "one scaling for all modules, and DoRA of all or of none"
        problems = [(s.name, why) for s in adapter.specs] or [("", "no change at all")]
    if adapter.layer_order is not None:
        problems.append(("layer_replication", "a deeper stack of layers"))
    if problems:
        raise MismatchError(
            "LT-411", "mlx-lm cannot hold this adapter", file=adapter.path,
            key=list_some((name for name, _ in problems), 3), got=problems[0][1],
            hint=None if adapter.layer_order else f"loratool convert ADAPTER --to {NAME} -o OUT",
        )  # fmt: skip


def _turned(source: Source, role: str, rank: int) -> Source:
    """A factor as mlx-lm has it, filled up with zeros to a rank that holds for every module."""
    if role == "lora_A":
        source = _filled(source, rank)  # (R, in)
        return arranged(source, source.shape, (1, 0))
    return _filled(arranged(source, source.shape, (1, 0)), rank)  # (R, out)


def _filled(source: Source, rows: int) -> Source:
    """With rows of zeros at its end."""
    if source.shape[0] == rows:
        return source
    shape = (rows, *source.shape[1:])
    data, missing = bytes(read_bytes(source)), tensor_bytes(source.dtype, shape) - source.nbytes
    # Without content it stays so: an outline of what will be written.
    return TensorData(source.name, source.dtype, shape, data + bytes(missing) if data else b"")


def _stacked(
    module: str, found: Mapping[int, DeltaSpec], rank: int, adapter: Adapter
) -> dict[str, Source]:
    """The factors of all experts, one after another."""
    if sorted(found) != list(range(len(found))):
        raise MismatchError(
            "LT-412", "mlx-lm adapts all experts of a layer, or none", file=adapter.path,
            key=module, got=f"experts {list_some(map(str, sorted(found)), 5)}",
        )  # fmt: skip
    made: dict[str, Source] = {}
    for role in ("lora_A", "lora_B"):
        sources = [_expert(found[number].fields[role], role, rank) for number in sorted(found)]
        if len({(s.shape, s.dtype) for s in sources}) > 1:
            raise MismatchError("LT-412", "factors of experts differ in their form",
                                file=adapter.path, key=module)  # fmt: skip
        data = b"".join(bytes(read_bytes(s)) for s in sources)
        name = f"{module}.{_LEAVES[role]}"
        shape = (len(sources), *sources[0].shape)
        made[name] = TensorData(name, sources[0].dtype, shape, data)
    return made


def _expert(source: Source, role: str, rank: int) -> Source:
    """A factor of one expert, (R, in) or (out, R)."""
    if role == "lora_A" or source.shape[1] == rank:
        return _filled(source, rank) if role == "lora_A" else source
    turned = _turned(source, role, rank)
    return arranged(turned, turned.shape, (1, 0))


def _config(
    adapter: Adapter, modules: Iterable[str], base_config: Mapping[str, Any]
) -> dict[str, Any]:
    """What mlx-lm reads; of layers it takes the last ones, and with -1 all."""
    spec, modules = adapter.specs[0], sorted(modules)
    found = [_LAYER.fullmatch(module) for module in modules]
    keys = {m["rest"] if m else module for m, module in zip(found, modules, strict=True)}
    first = min((int(m["number"]) for m in found if m), default=0)
    count = base_config.get("num_hidden_layers")
    layers = count - first if isinstance(count, int) and count > first else -1
    old = adapter.config if adapter.dialect == NAME else {}
    rank = max(s.rank for s in adapter.specs)
    own: Mapping[str, Any] = old.get("lora_parameters") or {}
    scale = own.get("scale") if own.get("scale") == spec.scaling else spec.scaling
    config: dict[str, Any] = {
        **old,
        "fine_tune_type": "dora" if spec.kind == "dora" else "lora",
        "num_layers": old.get("num_layers", layers),
        "lora_parameters": {
            "dropout": 0.0, **own, "rank": rank, "scale": scale,
            "keys": sorted({*keys, *(own.get("keys") or ())}),
        },
    }  # fmt: skip
    if adapter.base_model and "model" not in config:
        config["model"] = adapter.base_model
    return config
