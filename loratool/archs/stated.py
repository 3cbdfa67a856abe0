"""What a model's ``config.json`` states about its weights, and how a change of them is stated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from loratool.archs.layers import LAYER_COUNTS
from loratool.dtypes import DTYPES

WEIGHT_KEYS = ("dtype", "torch_dtype", "vocab_size", "tie_word_embeddings")
"""Keys that speak of weights."""

OUTPUT_KEYS = frozenset({
    "_name_or_path", "auto_map", "dtype", "quantization_config", "tie_word_embeddings",
    "torch_dtype", "transformers_version", "vocab_size",
})  # fmt: skip
"""What an output's own files decide, or what speaks of files that are not copied."""

_CLASSES = "architectures"
_SIZE = "vocab_size"
_TEXT = "text_config"


def model_type(config: Mapping[str, Any]) -> str:
    """``model_type``, or ""."""
    value = config.get("model_type", "")
    return value if isinstance(value, str) else ""


def class_name(config: Mapping[str, Any]) -> str:
    """The class of diffusers, or ""."""
    value = config.get("_class_name", "")
    return value if isinstance(value, str) else ""


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What is said of the model of text, where a model has several."""
    inner = config.get(_TEXT)
    return inner if isinstance(inner, Mapping) and inner else config


def name_of(config: Mapping[str, Any]) -> str | None:
    """The name or path that the model was loaded from, None if it is not said."""
    value = config.get("_name_or_path")
    return value if isinstance(value, str) else None


def is_causal(config: Mapping[str, Any]) -> bool:
    """True for a model that continues text."""
    names = config.get(_CLASSES)
    return isinstance(names, list) and any(str(n).endswith("ForCausalLM") for n in names)


def is_tied(config: Mapping[str, Any]) -> bool:
    """True if input embedding and output head are said to be one tensor."""
    return config.get("tie_word_embeddings") is True


def class_config(name: str) -> dict[str, Any]:
    """The keys that state a model's class."""
    return {_CLASSES: [name]}


def is_class_key(key: str) -> bool:
    """True for the key that states the class."""
    return key == _CLASSES


def dtype_config(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """What changes where all weights are cast; nothing if the type is not stated.

    Args:
        config: of the model.
        dtype: safetensors name.
    """
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    return {key: DTYPES[dtype].word} if key in config else {}


def decoder_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What changes where an untied head takes over the factor of the decoder's outputs."""
    key = "scale_decoder_outputs"
    return {key: False} if key in config else {}


def layer_counts(config: Mapping[str, Any]) -> set[int]:
    """Every number of layers that is stated."""
    parts = [c for c in (config, config.get(_TEXT)) if isinstance(c, Mapping)]
    return {n for c in parts for k in LAYER_COUNTS if isinstance(n := c.get(k), int)}


def layer_config(config: Mapping[str, Any], order: Sequence[int]) -> dict[str, Any]:
    """Changes for replicated layers: the count and every per-layer list.

    Args:
        config: of the model.
        order: the old layer of each new one.
    """
    prefix, part = "", config
    text = config.get(_TEXT)
    if isinstance(text, Mapping) and any(key in text for key in LAYER_COUNTS):
        prefix, part = f"{_TEXT}.", text
    changes: dict[str, Any] = {}
    for key in LAYER_COUNTS:
        if isinstance(part.get(key), int):
            changes[prefix + key] = len(order)
    for key, value in part.items():
        is_per_layer = "layer" in key and isinstance(value, list) and len(value) > max(order)
        if is_per_layer and not key.startswith("mlp_only"):
            changes[prefix + key] = [value[i] for i in order]
    return changes


def channels_config(config: Mapping[str, Any], key: str, old: int, new: int) -> dict[str, Any]:
    """Changes for a model whose input gets more channels; nothing where they are not stated.

    Args:
        config: of the model.
        key: that states them.
        old: how many there are.
        new: how many there will be.
    """
    if not key or config.get(key) != old:
        return {}
    out = "out_channels"  # where it says nothing, as many as come in
    return {key: new} if config.get(out) is not None else {key: new, out: old}


def vocabulary_config(config: Mapping[str, Any], old: set[int], size: int) -> dict[str, Any]:
    """Changes for a vocabulary of another size, wherever the size is stated or a default.

    Args:
        config: of the model.
        old: sizes that it has in its weights.
        size: the new one.
    """
    return dict.fromkeys(_size_keys(config, old), size)


def _size_keys(config: Mapping[str, Any], old: set[int]) -> Iterator[str]:
    text = config.get(_TEXT)
    if isinstance(text, Mapping):
        yield f"{_TEXT}.{_SIZE}"
    if _SIZE in config or not isinstance(text, Mapping):
        yield _SIZE
    yield from (key for key, value in _sizes(config, "") if value in old)


def _sizes(config: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, int]]:
    """Dotted keys such as ``decoder_vocab_size``, at any depth."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _sizes(value, f"{prefix}{key}.")
        elif type(value) is int and (key == _SIZE or key.endswith(f"_{_SIZE}")):
            yield prefix + key, value
