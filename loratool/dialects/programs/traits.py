"""What is in an adapter, and where, in the words that rules give as reasons; and shared rules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any

from loratool.adapter import Adapter, DeltaSpec
from loratool.archs.experts import parse_expert
from loratool.delta.forms import has_diagonal
from loratool.dialects.peft.keys import living_names
from loratool.dialects.programs.base import RAISES, UNSURE, WRONG, Hit, Rule, Test
from loratool.dialects.programs.look import Look, once
from loratool.errors import list_some

_CAUSAL = ("CAUSAL_LM", "SEQ_2_SEQ_LM")
_CAUSAL_CLASSES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_ROUTERS = ("gate", "router")


def read(look: Look) -> Adapter:
    """The adapter: these rules are asked of what loratool reads alone."""
    assert look.adapter is not None
    return look.adapter


def whole(test: Callable[[Adapter], str]) -> Test:
    """A rule on the file as a whole: why it applies, "" where it does not."""
    return lambda look: [Hit((), words)] if (words := test(read(look))) else []


def has(words: str, test: Callable[[DeltaSpec], bool]) -> Test:
    """A rule on single deltas; several programs have it."""

    @once
    def find(look: Look) -> Iterable[Hit]:
        names = tuple(s.name for s in read(look).specs if test(s))
        return [Hit(names, words)] if names else []

    return find


def option(key: str, words: str) -> Test:
    """An option of the configuration that is set."""
    return whole(lambda a: words if a.config.get(key) not in (None, False, [], {}, "") else "")


def needed(*keys: str) -> Test:
    """What the configuration must have."""

    @whole
    def test(adapter: Adapter) -> str:
        missing = [key for key in keys if key not in adapter.config]
        return f"no {missing[0]} in the configuration" if missing else ""

    return test


@whole
def method(adapter: Adapter) -> str:
    """Anything but LoRA."""
    name = str(adapter.config.get("peft_type", "LORA"))
    return "" if name == "LORA" else name


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


@whole
def layers(adapter: Adapter) -> str:
    """A deeper stack of the base's layers."""
    return "" if adapter.layer_order is None else "layer_replication"


def base_changes(look: Look) -> Iterable[Hit]:
    """PiSSA and its kin."""
    adapter = read(look)
    if adapter.replacements:
        from loratool.dialects.stated import from_base

        adapter = from_base(adapter)
    found = sorted({s.base_change for s in adapter.specs if s.base_change})
    names = tuple(s.name for s in adapter.specs if s.base_change)
    return [Hit(names, f"{list_some(found)} changes the base")] if found else []


def replaced(*origins: str) -> Test:
    """Whole tensors, by where they come from."""
    words = {"base_layer": "saved embeddings"}

    def find(look: Look) -> Iterable[Hit]:
        there = sorted({r.origin for r in read(look).replacements} & set(origins))
        names = (tuple(r.name for r in read(look).replacements if r.origin == o) for o in there)
        return [Hit(n, words.get(o, o)) for o, n in zip(there, names, strict=True)]

    return find


def leftovers(look: Look) -> Iterable[Hit]:
    """Tensors that are no part of any change: state of training, copies."""
    names = tuple(ref.name for ref in read(look).unclaimed)
    return [Hit(names, "other tensors")] if names else []


def dead_names(adapter: Adapter) -> Iterator[tuple[str, str]]:
    """(name, as PEFT would have written it) of tensors with another name."""
    return iter(_dead(adapter.key_order))


@lru_cache(maxsize=1)  # several programs ask
def _dead(names: tuple[str, ...]) -> list[tuple[str, str]]:
    return [(n, m) for n, m in zip(names, living_names(names), strict=True) if n != m]


@whole
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
) -> Test:
    """A program that computes α/r in its own way gets another scaling than PEFT.

    Args:
        scaling_of: its scaling of a module of a rank.
        ignored: options that it does not look at, and how they are called.
        since: the version that looks at them.
    """

    def find(look: Look) -> Iterable[Hit]:
        adapter = read(look)
        specs = [s for s in adapter.specs if s.row.has_factors and s.rank]
        names = tuple(
            s.name for s in specs
            if not math.isclose(s.scaling, scaling_of(adapter, s.rank), rel_tol=1e-6)
        )  # fmt: skip
        if not names:
            return []
        found = [word for key, word in ignored if adapter.config.get(key)]
        words = f"ignores {' and '.join(found) or 'the scaling of some modules'}"
        return [Hit(names, f"{words} before {since}" if since else words)]

    return find


def number(adapter: Adapter, key: str) -> float:
    """A number of the configuration, NaN if it is none."""
    value: Any = adapter.config.get(key)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number else math.nan


# --------------------------------------- rules that several servers of language models share

METHOD = Rule("method", RAISES, method, says="it knows no method but LoRA")
DORA = Rule("dora", RAISES, dora, says="it refuses use_dora")
DIAGONAL = Rule("diagonal", RAISES, diagonal, says="it has no diagonal between the factors")
LAYERS = Rule("layers", RAISES, layers, says="it cannot repeat layers")
BLOCKS = Rule(
    "blocks", RAISES, blocks, is_mended=True,
    says="block-diagonal factors have other shapes than it expects",
)  # fmt: skip
QALORA = Rule("qalora", RAISES, qalora, says="QA-LoRA's factors have other shapes")
CONV = Rule("conv", RAISES, conv, says="it has layers for matrices alone")
ATTENTION = Rule("attention", RAISES, attention, says="it has no layer for nn.MultiheadAttention")
BASE_CHANGES = Rule(
    "base-changes", WRONG, base_changes,
    says="the factors are added to the base as it is, which training had changed",
)  # fmt: skip
SAVED_EMBEDDINGS = Rule(
    "saved-embeddings", UNSURE, replaced("base_layer"),
    says="copies of embeddings are left out: right if they are the base's",
)  # fmt: skip
TASK = Rule("task", UNSURE, task, says="it serves models that generate text")
