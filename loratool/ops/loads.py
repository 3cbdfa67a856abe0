"""Which programs load an adapter, decided from its neutral form (no torch).

The rules were read from peft 0.21.2, vLLM's PEFT loader and llama.cpp's convert_lora_to_gguf.py;
whether a program supports the base model itself is not looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from loratool.adapter import Adapter
from loratool.report import Loads

VLLM_MAX_RANK = 16
"""Default of vLLM's ``--max-lora-rank``."""

_VLLM_IGNORES = {"alpha_pattern": "alpha_pattern", "rank_pattern": "rank_pattern"}
_LLAMA_CPP_IGNORES = {"use_rslora": "rsLoRA", "alpha_pattern": "alpha_pattern"}
_FOREIGN = {"peft-file": "no adapter_config.json"}
_CAUSAL = ("CAUSAL_LM", "SEQ_2_SEQ_LM")


def judge_loads(adapter: Adapter) -> tuple[Loads, ...]:
    """Verdicts for PEFT, vLLM and llama.cpp, in this order.

    Example:
        >>> judge_loads(open_adapter(Path("style"), ReadOptions()))[1]  # doctest: +SKIP
        Loads(program='vLLM', verdict='no', reasons=('modules_to_save',))
    """
    if adapter.dialect != "peft":
        why = (_FOREIGN.get(adapter.dialect, f"{adapter.dialect} file"),)
        native = {"gguf": "llama.cpp"}.get(adapter.dialect)
        return tuple(
            Loads(program, "yes" if program == native else "no", () if program == native else why)
            for program in ("PEFT", "vLLM", "llama.cpp")
        )
    return (Loads("PEFT", "yes"), _vllm(adapter), _llama_cpp(adapter))


def _vllm(adapter: Adapter) -> Loads:
    refused = _refused(adapter)
    if refused:
        return Loads("vLLM", "no", tuple(refused))
    if wrong := _base_changes(adapter) + _patterns(
        adapter, _config_scaling(adapter), _VLLM_IGNORES
    ):
        return Loads("vLLM", "wrong", tuple(wrong))
    if any(spec.layout == "experts" for spec in adapter.specs):
        return Loads("vLLM", "unsure", ("expert layouts differ between versions",))
    if task := _other_task(adapter):
        return Loads("vLLM", "unsure", (task,))
    top = max((spec.rank for spec in adapter.specs), default=0)
    return Loads("vLLM", "yes", (f"--max-lora-rank {top}",) if top > VLLM_MAX_RANK else ())


def _llama_cpp(adapter: Adapter) -> Loads:
    refused = _refused(adapter)
    if refused:
        return Loads("llama.cpp", "no", tuple(refused))
    alpha = adapter.config.get("lora_alpha")
    wrong = _base_changes(adapter)
    if isinstance(alpha, (int, float)):
        wrong += _patterns(adapter, lambda rank: alpha / rank, _LLAMA_CPP_IGNORES)
    if wrong:
        return Loads("llama.cpp", "wrong", tuple(wrong))
    if task := _other_task(adapter):
        return Loads("llama.cpp", "unsure", (task,))
    return Loads("llama.cpp", "yes")


def _refused(adapter: Adapter) -> list[str]:
    """What both vLLM and llama.cpp's converter stop at."""
    config = adapter.config
    reasons = []
    if str(config.get("peft_type", "LORA")) != "LORA":
        reasons.append(str(config["peft_type"]))
    origins = {replacement.origin for replacement in adapter.replacements}
    reasons += [
        {"modules_to_save": "modules_to_save", "base_layer": "saved embeddings"}.get(o, o)
        for o in sorted(origins)
        if o != "bias"
    ]
    if any(spec.kind == "dora" for spec in adapter.specs):
        reasons.append("DoRA")
    if "bias" in origins or any(spec.kind == "vector" for spec in adapter.specs):
        reasons.append("bias")
    if adapter.layer_order is not None:
        reasons.append("layer_replication")
    if any(spec.blocks is not None for spec in adapter.specs):
        reasons.append("BD-LoRA")
    if any(spec.layout == "conv" for spec in adapter.specs):
        reasons.append("conv")
    if any(spec.parameter == "in_proj_weight" for spec in adapter.specs):
        reasons.append("nn.MultiheadAttention")
    return reasons


def _base_changes(adapter: Adapter) -> list[str]:
    return sorted(
        {f"{spec.base_change} changes the base" for spec in adapter.specs if spec.base_change}
    )


def _patterns(
    adapter: Adapter, scaling_of: Callable[[int], float], ignores: Mapping[str, str]
) -> list[str]:
    """Why a program that computes scaling by ``scaling_of(rank)`` gets another result."""
    specs = [spec for spec in adapter.specs if spec.kind == "lowrank" and spec.rank]
    if all(math.isclose(s.scaling, scaling_of(s.rank), rel_tol=1e-6) for s in specs):
        return []
    found = [word for key, word in ignores.items() if adapter.config.get(key)]
    return [f"ignores {' and '.join(found) or 'the scaling of some modules'}"]


def _config_scaling(adapter: Adapter) -> Callable[[int], float]:
    """The rule of vLLM: one scaling for all modules, from the configuration's r and lora_alpha."""
    rank, alpha = adapter.config.get("r"), adapter.config.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, (int, float)) or rank < 1:
        return lambda _: math.nan
    divisor = math.sqrt(rank) if adapter.config.get("use_rslora") else rank
    return lambda _: alpha / divisor


def _other_task(adapter: Adapter) -> str:
    task = adapter.config.get("task_type")
    return "" if task is None or task in _CAUSAL else f"task {task}"
