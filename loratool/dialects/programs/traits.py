"""What is in an adapter, in the words that rules give as reasons; "" = it is not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

from loratool.adapter import Adapter, DeltaSpec
from loratool.archs.experts import parse_expert
from loratool.delta.forms import has_diagonal
from loratool.dialects.peft.keys import living_names
from loratool.errors import list_some

_CAUSAL = ("CAUSAL_LM", "SEQ_2_SEQ_LM")
_CAUSAL_CLASSES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_ROUTERS = ("gate", "router")


def method(adapter: Adapter) -> str:
    """Anything but LoRA."""
    name = str(adapter.config.get("peft_type", "LORA"))
    return "" if name == "LORA" else name


def has(words: str, test: Callable[[DeltaSpec], bool]) -> Callable[[Adapter], str]:
    """A rule on single deltas."""
    return lambda adapter: words if any(map(test, adapter.specs)) else ""


def option(key: str, words: str) -> Callable[[Adapter], str]:
    """An option of the configuration that is set."""
    return lambda adapter: words if adapter.config.get(key) not in (None, False, [], {}, "") else ""


dora = has("DoRA", lambda s: s.scales_rows)
lora_bias = has("bias", lambda s: not s.is_matrix)
diagonal = has("KaSA", has_diagonal)
blocks = has("BD-LoRA", lambda s: s.blocks is not None)
conv = has("conv", lambda s: s.layout == "conv")
attention = has("nn.MultiheadAttention", lambda s: s.parameter == "in_proj_weight")
conv1d = has("Conv1D", lambda s: s.transposed)
alora = option("alora_invocation_tokens", "aLoRA")
qalora = option("use_qalora", "QA-LoRA")
experts = has("fused experts", lambda s: s.layout == "experts")
numbered_experts = has(
    "experts by number",
    lambda s: (e := parse_expert(s.name)) is not None and e.expert is not None,
)
routers = has("routers", lambda s: s.module.rpartition(".")[2] in _ROUTERS)
embeddings = has("embeddings", lambda s: s.layout == "embedding")
head = has("lm_head", lambda s: s.module.rpartition(".")[2] == "lm_head")


def layers(adapter: Adapter) -> str:
    """A deeper stack of the base's layers."""
    return "" if adapter.layer_order is None else "layer_replication"


def base_changes(adapter: Adapter) -> str:
    """PiSSA and its kin."""
    found = sorted({s.base_change for s in adapter.specs if s.base_change})
    return f"{list_some(found)} changes the base" if found else ""


def replaced(*origins: str) -> Callable[[Adapter], str]:
    """Whole tensors, by where they come from."""
    words = {"base_layer": "saved embeddings"}

    def test(adapter: Adapter) -> str:
        there = {r.origin for r in adapter.replacements} & set(origins)
        return ", ".join(words.get(o, o) for o in sorted(there))

    return test


def leftovers(adapter: Adapter) -> str:
    """Tensors that are no part of any change: state of training, copies."""
    return "other tensors" if adapter.unclaimed else ""


def dead_names(adapter: Adapter) -> Iterator[tuple[str, str]]:
    """(name, as PEFT would have written it) of tensors with another name."""
    return iter(_dead(adapter.key_order))


@lru_cache(maxsize=1)  # several programs ask
def _dead(names: tuple[str, ...]) -> list[tuple[str, str]]:
    return [(n, m) for n, m in zip(names, living_names(names), strict=True) if n != m]


def task(adapter: Adapter) -> str:
    """Anything but text that is generated, as far as the configuration says."""
    stated = adapter.config.get("task_type")
    if stated in _CAUSAL:
        return ""
    if stated:
        return f"task {stated}"
    mapping = adapter.config.get("auto_mapping")
    name = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    if not isinstance(name, str) or not name:
        return "" if _looks_like_a_decoder(adapter) else "no task_type"
    return "" if name.endswith(_CAUSAL_CLASSES) else name


def _looks_like_a_decoder(adapter: Adapter) -> bool:
    """Names of layers as nearly every language model has them."""
    words = ("self_attn.", "mlp.", "lm_head", "embed_tokens", "input_layernorm", "model.norm")
    plain = [n for n in _names(adapter) if ".layers." in f".{n}" or "lm_head" in n or "embed" in n]
    return bool(plain) and all(any(w in n for w in words) for n in plain) and not any(
        "encoder" in n or "vision" in n or "visual" in n for n in _names(adapter)
    )  # fmt: skip


def _names(adapter: Adapter) -> list[str]:
    return [*(s.name for s in adapter.specs), *(r.name for r in adapter.replacements)]


def uneven_scaling(
    scaling_of: Callable[[Adapter, int], float], *ignored: tuple[str, str], since: str = ""
) -> Callable[[Adapter], str]:
    """A program that computes α/r in its own way gets another scaling than PEFT.

    Args:
        scaling_of: its scaling of a module of a rank.
        ignored: options that it does not look at, and how they are called.
        since: the version that looks at them.
    """

    def test(adapter: Adapter) -> str:
        specs = [s for s in adapter.specs if s.row.has_factors and s.rank]
        if all(math.isclose(s.scaling, scaling_of(adapter, s.rank), rel_tol=1e-6) for s in specs):
            return ""
        found = [word for key, word in ignored if adapter.config.get(key)]
        words = f"ignores {' and '.join(found) or 'the scaling of some modules'}"
        return f"{words} before {since}" if since else words

    return test


def number(adapter: Adapter, key: str) -> float:
    """A number of the configuration, NaN if it is none."""
    value: Any = adapter.config.get(key)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number else math.nan
