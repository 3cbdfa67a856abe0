"""What llama.cpp calls the tensors of language models: its architectures, and names both ways.

token_embd, output, output_norm, blk.<number>.<leaf>; all experts of a layer lie in one tensor
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from loratool.frozen import Frozen
from loratool.lazy import regex

_LAYER = regex(r"blk\.(\d+)\.(\w+)")
_LIVING = regex(
    r"(?:model\.)?(?:language_model\.)?(?:model\.)?layers\.(?P<number>\d+)\.(?P<rest>.+)", re.DOTALL
)
_EXPERT = regex(r"(?<=\.experts\.)(\d+)(?=\.)")
_OUTER = {"token_embd": "model.embed_tokens", "output": "lm_head", "output_norm": "model.norm"}
_TABLE = regex(r"(?:model\.)?(?:language_model\.)?(?:model\.)?embed_tokens")
_OUTER_NORM = regex(r"(?:model\.)?(?:language_model\.)?norm")
_HEAD = regex(r"(?:language_model\.)?lm_head")
EXPERT = "*"
"""In a name: the number of any expert."""
Names = Mapping[str, tuple[str, ...]]
"""Leaf in a layer -> what transformers calls it; the first is what is read."""

_ATTENTION: Names = {
    "attn_q": ("self_attn.q_proj",), "attn_k": ("self_attn.k_proj",),
    "attn_v": ("self_attn.v_proj",), "attn_output": ("self_attn.o_proj",),
}  # fmt: skip
_MLP: Names = {
    "ffn_gate": ("mlp.gate_proj",), "ffn_up": ("mlp.up_proj",), "ffn_down": ("mlp.down_proj",),
}  # fmt: skip
_NORMS: Names = {"attn_norm": ("input_layernorm",), "ffn_norm": ("post_attention_layernorm",)}
_HEAD_NORMS: Names = {"attn_q_norm": ("self_attn.q_norm",), "attn_k_norm": ("self_attn.k_norm",)}
_MIXTRAL: Names = {
    "ffn_gate_inp": ("block_sparse_moe.gate", "mlp.gate"),
    "ffn_gate_exps": ("block_sparse_moe.experts.*.w1", "mlp.experts.*.gate_proj"),
    "ffn_up_exps": ("block_sparse_moe.experts.*.w3", "mlp.experts.*.up_proj"),
    "ffn_down_exps": ("block_sparse_moe.experts.*.w2", "mlp.experts.*.down_proj"),
}  # fmt: skip
_QWEN_MOE: Names = {
    "ffn_gate_inp": ("mlp.gate",), "ffn_gate_exps": ("mlp.experts.*.gate_proj",),
    "ffn_up_exps": ("mlp.experts.*.up_proj",), "ffn_down_exps": ("mlp.experts.*.down_proj",),
}  # fmt: skip
_SHARED: Names = {
    "ffn_gate_shexp": ("mlp.shared_expert.gate_proj",),
    "ffn_up_shexp": ("mlp.shared_expert.up_proj",),
    "ffn_down_shexp": ("mlp.shared_expert.down_proj",),
    "ffn_gate_inp_shexp": ("mlp.shared_expert_gate",),
}  # fmt: skip
_DENSE: Names = {**_ATTENTION, **_MLP, **_NORMS}


class Architecture(Frozen):
    """How llama.cpp lays out one kind of model.

    Attributes:
        models: what ``model_type`` of a configuration says of it, and of one with experts the last.
        leaves: of its layers.
        is_paired: rows of queries and keys lie head by head, halves in turns.
        has_head: its output has weights of its own.
    """

    models: tuple[str, ...]
    leaves: Names
    is_paired: bool = False
    has_head: bool = True


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(("llama", "mistral", "mixtral"), {**_DENSE, **_MIXTRAL}, True),
    "qwen2": Architecture(("qwen2",), _DENSE),
    "qwen3": Architecture(("qwen3",), {**_DENSE, **_HEAD_NORMS}),
    "qwen2moe": Architecture(("qwen2_moe",), {**_ATTENTION, **_NORMS, **_QWEN_MOE, **_SHARED}),
    "qwen3moe": Architecture(
        ("qwen3_moe",), {**_ATTENTION, **_NORMS, **_HEAD_NORMS, **_QWEN_MOE}
    ),
    "gemma": Architecture(("gemma",), {**_ATTENTION, **_MLP}, has_head=False),
    "gemma2": Architecture(("gemma2",), {**_ATTENTION, **_MLP}, has_head=False),
    "gemma3": Architecture(("gemma3_text", "gemma3"), {**_ATTENTION, **_MLP}),
    "phi3": Architecture(("phi3",), {
        "attn_qkv": ("self_attn.qkv_proj",), "attn_output": ("self_attn.o_proj",),
        "ffn_up": ("mlp.gate_up_proj",), "ffn_down": ("mlp.down_proj",),
    }),
    "granite": Architecture(("granite",), {**_ATTENTION, **_MLP}, True),
    "smollm3": Architecture(("smollm3",), {**_ATTENTION, **_MLP}, True),
    "olmo2": Architecture(("olmo2", "olmo3"), {**_ATTENTION, **_MLP}),
}  # fmt: skip
"""By the names that llama.cpp gives them."""
HEADS = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
"""Leaves whose rows lie in pairs -> what the configuration calls the number of their heads."""


def architecture_of(model: str) -> str:
    """llama.cpp's name for a ``model_type``, "" where it is not known here."""
    return next((name for name, one in ARCHITECTURES.items() if model in one.models), "")


def living_module(architecture: str, tensor: str) -> str:
    """What transformers calls a module of a file, "" if nothing; `EXPERT` stands for a number.

    Args:
        architecture: a key of `ARCHITECTURES`.
        tensor: its name without ``.weight`` or ``.bias``.
    """
    if match := _LAYER.fullmatch(tensor):
        names = ARCHITECTURES[architecture].leaves.get(match[2])
        return f"model.layers.{match[1]}.{names[0]}" if names else ""
    is_absent = tensor == "output" and not ARCHITECTURES[architecture].has_head
    return "" if is_absent else _OUTER.get(tensor, "")


def ggml_module(architecture: str, module: str) -> tuple[str, int | None]:
    """What llama.cpp calls a module of transformers, and the number of its expert.

    Returns:
        ("", None) where it has no place.
    """
    if match := _LIVING.fullmatch(module):
        expert = _EXPERT.search(match["rest"])
        rest = _EXPERT.sub(EXPERT, match["rest"])
        for leaf, names in ARCHITECTURES[architecture].leaves.items():
            if rest in names:
                number = int(expert[1]) if expert else None
                return f"blk.{match['number']}.{leaf}", number
        return "", None
    if _TABLE.fullmatch(module):
        return "token_embd", None
    if _OUTER_NORM.fullmatch(module):
        return "output_norm", None
    if _HEAD.fullmatch(module) and ARCHITECTURES[architecture].has_head:
        return "output", None
    return "", None


def is_norm(architecture: str, tensor: str) -> bool:
    """True for a norm whose numbers are the model's own: some architectures have 1 added."""
    has_norms = "attn_norm" in ARCHITECTURES[architecture].leaves
    is_one = leaf_of(tensor).endswith("_norm")
    return has_norms and is_one and bool(living_module(architecture, tensor))


def leaf_of(tensor: str) -> str:
    """The last part of a name: ``attn_q`` of ``blk.0.attn_q``."""
    return tensor.rpartition(".")[2]
