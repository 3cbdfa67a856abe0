"""``adapter_config.json`` for an adapter that was made here."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from loratool.adapter import MAX_ALPHA, Adapter, DeltaSpec
from loratool.dialects.peft import own_config
from loratool.dialects.peft.new_keys import NewLayout
from loratool.dialects.peft.patterns import endings
from loratool.dialects.peft.targets import NO_TARGETS
from loratool.dialects.peft.tasks import heads_of, old_task, task_type_of
from loratool.errors import MismatchError

PEFT_VERSION = "0.21.2"  # whose reading the files were tested with
# What a changed adapter keeps of its old configuration: fields that say nothing about numbers.
_KEPT = ("auto_mapping", "revision", "lora_dropout", "ensure_weight_tying")


def new_config(
    adapter: Adapter,
    layout: NewLayout,
    *,
    base_config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A configuration under which PEFT 0.21.2 finds every tensor of the adapter.

    Ranks and alphas follow from the specs: one value for all where they agree, else
    ``rank_pattern`` and ``alpha_pattern`` with literal paths.

    Args:
        adapter: the deltas and replacements.
        layout: how they lie in a PEFT model.
        base_config: the base's ``config.json``, for ``task_type``.
    """
    bare = {s.name: s for specs in layout.parameters.values() for s in specs}
    rows = {**layout.targets, **bare}
    ranks = {name: spec.rank for name, spec in rows.items()}
    alphas = {name: alpha_of(spec) for name, spec in rows.items()}
    for name, value in alphas.items():
        if not abs(value) <= MAX_ALPHA:
            raise MismatchError(
                "LT-413", "an alpha is too large for a configuration", file=adapter.path, key=name,
                expected=f"at most {MAX_ALPHA:g}", got=f"{value:g}",
                hint="smaller weights",
            )  # fmt: skip
    # PEFT follows patterns of parameters, and warns that it does not: better have none.
    rank, alpha = (_commonest([values[n] for n in bare or rows]) for values in (ranks, alphas))
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": _task(adapter, layout, base_config),
        "base_model_name_or_path": adapter.base_model,
        "peft_version": _version(adapter),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": _pattern(ranks, rank),
        "alpha_pattern": _pattern(alphas, alpha),
        "target_modules": sorted(layout.targets) if layout.is_targeted else NO_TARGETS,
        "modules_to_save": layout.modules_to_save or None,
        "bias": layout.bias,
        "lora_bias": bool(layout.biases),
        "use_dora": any(s.kind == "dora" for s in adapter.specs),
        "use_rslora": False,
        "fan_in_fan_out": not layout.parameters and any(s.transposed for s in adapter.specs),
        "init_lora_weights": True,
        "lora_dropout": 0.0,
    }
    if layout.parameters:
        config["target_parameters"] = [s.name for ss in layout.parameters.values() for s in ss]
        # Older versions packed experts the other way round, and readers go by the version.
        if own_config(adapter) and not layout.outputs:
            config["peft_version"] = adapter.config.get("peft_version", PEFT_VERSION)
    if layout.excluded:
        config["exclude_modules"] = "|".join(re.escape(m) for m in layout.excluded)
    if layout.tokens:
        config["trainable_token_indices"] = {
            module: list(found.rows or ()) for module, found in layout.tokens.items()
        }
    if adapter.layer_order is not None:
        config["layer_replication"] = _replication(adapter.layer_order)
    old = own_config(adapter)
    kept = [k for k in _KEPT if k != "lora_dropout" or not layout.parameters]  # PEFT has not both
    return config | {key: old[key] for key in kept if old.get(key) is not None}


def _version(adapter: Adapter) -> str:
    """The version whose reading counts: square experts keep the one that they were packed for."""
    old = own_config(adapter).get("peft_version")
    square = any(
        s.experts and s.fields["lora_A"].shape[1] == s.fields["lora_B"].shape[0]
        for s in adapter.specs
    )
    return old if square and isinstance(old, str) else PEFT_VERSION


def alpha_of(spec: DeltaSpec) -> int | float:
    """The alpha whose α/r is the spec's scaling; a whole number if it is one.

    Not every scaling is an α/r in floating point: the nearest one is off by 2⁻⁵² of it at most.
    """
    alpha = spec.alpha
    if alpha is None or alpha / spec.rank != spec.scaling:
        alpha = spec.scaling * spec.rank
    return int(alpha) if float(alpha).is_integer() else alpha


def _task(adapter: Adapter, layout: NewLayout, base_config: Mapping[str, Any] | None) -> str | None:
    kept, heads = old_task(adapter), heads_of(adapter, base_config)
    has_head = any(module.endswith(heads) for module in layout.saved)
    if not heads or has_head:
        return kept or task_type_of(base_config or {})
    # PEFT fails on a file without such a head, if the model has one.
    return kept if kept and not any(m.endswith(heads) for m in layout.modules) else None


def _commonest(values: Sequence[Any]) -> Any:
    return Counter(values).most_common(1)[0][0] if values else 8


def _pattern(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Literal patterns for the names whose value is not the default."""
    # A path also matches as the end of a longer one: then it is tied to the beginning.
    ends = {ending for name in values for ending in endings(name)}
    return {
        ("^" if name in ends else "") + re.escape(name): value
        for name, value in values.items()
        if value != default
    }


def _replication(order: Sequence[int]) -> list[list[int]]:
    """Runs [first, end) of consecutive layers."""
    runs: list[list[int]] = []
    for layer in order:
        if runs and layer == runs[-1][1]:
            runs[-1][1] += 1
        else:
            runs.append([layer, layer + 1])
    return runs
