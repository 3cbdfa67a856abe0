"""Facts of an architecture that its weight files do not tell: orientation, sizes, ties."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from loratool.archs.base import Rule, load_data
from loratool.frozen import Frozen

_UNPAIRED = ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "phi3")
_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads", "attention_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "multi_query_group_num", "n_head_kv")
_HIDDEN = ("hidden_size", "n_embd", "d_model", "embed_dim", "dim")
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


def model_types(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Every ``model_type`` of a configuration and of the configurations inside it."""
    return tuple(dict.fromkeys(t for c in _configs(config) if (t := _type_of(c))))


def is_native(config: Mapping[str, Any]) -> bool:
    """True for a model whose classes are those of transformers or diffusers."""
    if any("_class_name" in part for part in _configs(config)):
        return True
    return config.get("model_type") in load_data("classes")["native"] and "auto_map" not in config


def stores_transposed(config: Mapping[str, Any], module: str) -> bool | None:
    """Is the module a Hugging Face ``Conv1D``, stored (in, out)?

    Returns:
        True or False when the architecture says so, None when the configuration is missing, belongs
        to custom code or names a model that is not known.
    """
    if any(is_conv1d(t, module) for t in model_types(config)):
        return True
    is_custom = any("auto_map" in part for part in _configs(config))
    return False if is_native(config) and not is_custom else None


def is_conv1d(model_type: str, module: str) -> bool:
    """True if the module of a native model of this type is a Hugging Face ``Conv1D``.

    Example:
        >>> is_conv1d("gpt2", "transformer.h.0.attn.c_attn")
        True
    """
    return module.rpartition(".")[2] in load_data("facts")["conv1d"].get(model_type, ())


def has_transposed_experts(config: Mapping[str, Any]) -> bool:
    """True if the model computes with experts stored (E, in, out) (gpt-oss, Aria)."""
    return _any_type(config, "transposed_experts")


def has_interleaved_experts(config: Mapping[str, Any]) -> bool:
    """True if gate and up alternate along the out axis of the fused experts (gpt-oss)."""
    return _any_type(config, "interleaved_experts")


def has_flipped_experts(config: Mapping[str, Any]) -> bool:
    """True if weight files may store the experts transposed against the running model."""
    return _any_type(config, "flipped_experts")


def experts_lie_turned(config: Mapping[str, Any], name: str, shape: Sequence[int]) -> bool:
    """True if a stack of experts lies (E, in, out) in its file.

    Files of flipped experts do as they were published, and (E, out, in) as transformers 5 saves
    them: the hidden size tells, where it is not both sizes.

    Args:
        config: of the base.
        name: of the tensor.
        shape: of the tensor, three axes.
    """
    if has_transposed_experts(config):
        return True
    if not has_flipped_experts(config):
        return False
    hidden = _first_int(sub_config(config, name), _HIDDEN)
    is_output = "down" in name.rpartition(".")[2]  # writes what the others read
    return shape[1] == shape[2] or hidden != shape[1 if is_output else 2]


def alias_rules(config: Mapping[str, Any]) -> tuple[Rule, ...]:
    """Pairs of names that are one tensor in the model but may both be in the weight files."""
    table = load_data("facts")["aliases"]
    return tuple(Rule(a, b) for t in model_types(config) for a, b in table.get(t, ()))


class Heads(Frozen):
    """Attention sizes of one (sub-)model; 0 = the configuration does not say.

    Attributes:
        heads: number of query heads.
        kv_heads: number of key and value heads.
        head_dim: size of one head.
    """

    heads: int
    kv_heads: int
    head_dim: int


def attention_sizes(config: Mapping[str, Any], module: str) -> Heads:
    """Attention sizes for a module, from the sub-configuration that it belongs to."""
    part = sub_config(config, module)
    heads = _first_int(part, _HEADS)
    nested = _mapping(part, "attn_config")
    kv_heads = _first_int(part, _KV_HEADS) or _first_int(nested, ("kv_n_heads",))
    head_dim = _first_int(part, ("head_dim", "kv_channels"))
    hidden = _first_int(part, _HIDDEN)
    if not head_dim and heads and hidden % heads == 0:
        head_dim = hidden // heads
    return Heads(heads, kv_heads or heads, head_dim)


def pair_height(config: Mapping[str, Any], module: str) -> int:
    """Rows of a head whose halves lie in turns where a program turns pairs of rows; 0 if unknown.

    2 is no order at all: of these models such programs leave rows as transformers has them.
    """
    kind = sub_config(config, module).get("model_type") or config.get("model_type")
    return 2 if kind in _UNPAIRED else attention_sizes(config, module).head_dim


def sub_config(config: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """The configuration of the part of a model that a module lies in."""
    if any(word in module for word in ("vision", "visual", "image")):
        return _mapping(config, "vision_config") or config
    if any(word in module for word in ("audio", "speech")):
        return _mapping(config, "audio_config") or config
    return _mapping(config, "text_config") or _mapping(config, "llm_config") or config


def _configs(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield config
    for value in config.values():
        if isinstance(value, Mapping) and ("model_type" in value or "_class_name" in value):
            yield from _configs(value)


def _type_of(config: Mapping[str, Any]) -> str:
    value = config.get("model_type", "")
    return value if isinstance(value, str) else ""


def _any_type(config: Mapping[str, Any], fact: str) -> bool:
    return any(t in load_data("facts")[fact] for t in model_types(config))


def _mapping(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key)
    return value if isinstance(value, Mapping) else {}


def _first_int(config: Mapping[str, Any], keys: tuple[str, ...]) -> int:
    for key in keys:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return 0
