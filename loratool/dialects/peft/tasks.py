"""What a model is trained for, as PEFT calls it, and what it then saves whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loratool.adapter import Adapter
from loratool.dialects.peft import own_config

_TASKS = (
    ("ForCausalLM", "CAUSAL_LM"),
    ("LMHeadModel", "CAUSAL_LM"),
    ("ForConditionalGeneration", "SEQ_2_SEQ_LM"),
    ("ForSequenceClassification", "SEQ_CLS"),
    ("ForTokenClassification", "TOKEN_CLS"),
    ("ForQuestionAnswering", "QUESTION_ANS"),
)
# Ends of heads that PEFT adds to modules_to_save by itself for these tasks.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def task_type_of(config: Mapping[str, Any]) -> str | None:
    """PEFT's ``task_type`` for a base's ``config.json``, None where PEFT has none.

    Example:
        >>> task_type_of({"architectures": ["LlamaForCausalLM"]})
        'CAUSAL_LM'
    """
    architectures = config.get("architectures")
    names = architectures if isinstance(architectures, list) else []
    for ending, task in _TASKS:
        if any(isinstance(n, str) and n.endswith(ending) for n in names):
            # Vision-language models have the same ending, but no encoder-decoder.
            if task == "SEQ_2_SEQ_LM" and config.get("is_encoder_decoder") is not True:
                return None
            return task
    return None


def heads_of(adapter: Adapter, base_config: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Ends of modules that PEFT saves whole for the task of an adapter."""
    return _HEADS.get(old_task(adapter) or task_type_of(base_config or {}) or "", ())


def old_task(adapter: Adapter) -> str | None:
    """What the configuration that it was read with says."""
    kept = own_config(adapter).get("task_type")
    return kept if isinstance(kept, str) else None
