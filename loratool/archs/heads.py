"""Heads of tasks: which class a body with a trained head is, and what other classes' heads are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from loratool.archs.base import load_data
from loratool.lazy import regex

_TASK = regex(r"For[A-Z]\w*$")
_STEM = regex(
    r"(ForConditionalGeneration|For[A-Z]\w*|WithLMHeadModel|LMHeadModel|DoubleHeadsModel|MTModel|"
    r"Model)$"
)
_NUMBERS = ("ForQuestionAnswering", "Classification")  # classes that have ``num_labels`` outputs


def class_of(config: Mapping[str, Any]) -> str:
    """The class that a model's ``config.json`` names, "" if it names none."""
    classes = config.get("architectures")
    first = classes[0] if isinstance(classes, list) and classes else ""
    return first if isinstance(first, str) else ""


def is_language_model(name: str) -> bool:
    """True for a class with an output layer over the vocabulary."""
    return name.endswith(tuple(load_data("facts")["head_classes"]))


def task_class(adapter: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    """The class that an adapter with a head of its own was trained as, "" if that is not known.

    Args:
        adapter: ``adapter_config.json``.
        base: ``config.json`` of the base.

    Example:
        >>> task_class({"task_type": "SEQ_CLS"}, {"architectures": ["LlamaForCausalLM"]})
        'LlamaForSequenceClassification'
    """
    auto = adapter.get("auto_mapping")
    named = auto.get("base_model_class") if isinstance(auto, Mapping) else None
    if isinstance(named, str) and _TASK.search(named):
        return task_of({"architectures": [named]})
    ending: str | None = load_data("heads")["tasks"].get(str(adapter.get("task_type")))
    own = class_of(base)
    if not ending or not own:
        return ""
    stem = _STEM.sub("", own)
    if str(base.get("model_type", "")).endswith("_text") and not stem.endswith("Text"):
        stem += "Text"  # the text part of a family whose own name is the whole
    return stem + ending


def task_of(config: Mapping[str, Any]) -> str:
    """The class of a checkpoint with a task's head, "" for language models and bare bodies."""
    name = class_of(config)
    return name if _TASK.search(name) and not is_language_model(name) else ""


def is_other_head(name: str) -> bool:
    """True for tensors of a language model's head, or of any task's."""
    module = name.rpartition(".")[0]
    known = load_data("heads")["heads"]
    outer = name.partition(".")[0] in known
    biases = tuple(load_data("facts")["vocabulary_biases"])
    return outer or module.endswith((".lm_head", ".embed_out")) or name.endswith(biases)


def is_pooler(name: str) -> bool:
    """True for the layer over the first token that some classes have and others leave out."""
    return "pooler" in name.split(".")[:3]


def has_pooler(class_name: str) -> bool | None:
    """Does a class with a task's head read its body's pooler?  None = it has none, or unknown."""
    data = load_data("heads")
    if class_name in data["pooled"]:
        return True
    return False if class_name in data["unpooled"] else None


def label_count(class_name: str, heads: Mapping[str, tuple[int, ...]]) -> int | None:
    """``num_labels`` of a class from the shapes of its head, None if it does not follow."""
    if not class_name.endswith(_NUMBERS):
        return None
    endings = (*load_data("heads")["labelled"], "qa_outputs")
    rows = {
        shape[0]
        for name, shape in heads.items()
        if len(shape) == 2 and name.endswith(".weight")
        and (name.split(".")[-2] in endings or name.split(".")[-2].isdigit())
    }  # fmt: skip
    return rows.pop() if len(rows) == 1 else None


def label_config(
    config: Mapping[str, Any], count: int, names: Iterable[Any] = ()
) -> dict[str, Any]:
    """Changes that give a configuration ``count`` labels; none where it has as many.

    Args:
        config: ``config.json`` of the base.
        count: number of labels.
        names: what they are called; LABEL_0 … where this does not fit.
    """
    listed = config.get("id2label")
    stated = config.get("num_labels")
    now = len(listed) if isinstance(listed, Mapping) else stated if stated is not None else 2
    if now == count:
        return {}
    called = [str(n) for n in names]
    if len(set(called)) != count:
        called = [f"LABEL_{i}" for i in range(count)]
    return {
        "id2label": {str(i): name for i, name in enumerate(called)},
        "label2id": {name: i for i, name in enumerate(called)},
        "num_labels": count,
    }
