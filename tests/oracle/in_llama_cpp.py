"""A model and its adapters in llama.cpp itself, by llama-cpp-python: what does it compute?"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf  # type: ignore[import-not-found]
import llama_cpp  # type: ignore[import-not-found]
import numpy as np
import torch

_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "mlp.gate": "ffn_gate_inp",
}  # fmt: skip


def save_model(model: Any, path: Path) -> Path:
    """A Llama or Mixtral of transformers in float32 as a GGUF file, without a vocabulary."""
    config = model.config
    out = gguf.GGUFWriter(str(path), "llama")
    out.add_vocab_size(config.vocab_size)
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_block_count(config.num_hidden_layers)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_rope_dimension_count(config.head_dim)
    out.add_rope_freq_base(config.rope_parameters["rope_theta"])
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_tokenizer_model("none")
    if experts := getattr(config, "num_local_experts", 0):
        out.add_expert_count(experts)
        out.add_expert_used_count(config.num_experts_per_tok)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, value in _split(model.state_dict()):
        stem = name.removesuffix(".weight")
        number, _, rest = stem.removeprefix("model.layers.").partition(".")
        leaf = _NAMES.get(rest if stem.startswith("model.layers.") else stem, rest)
        array = value.float().numpy()
        if leaf in heads:  # its rotation takes neighbours, that of transformers halves
            halves = array.reshape(heads[leaf], 2, -1, array.shape[1])
            array = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)
        full = f"blk.{number}.{leaf}" if stem.startswith("model.layers.") else leaf
        out.add_tensor(f"{full}.weight", array)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def _split(tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Stacks of experts under its names, gate and up apart."""
    for name, value in tensors.items():
        layer, is_stack, leaf = name.partition("mlp.experts.")
        if not is_stack:
            yield name, value
        elif leaf == "down_proj":
            yield f"{layer}ffn_down_exps.weight", value
        else:
            for word, half in zip(("gate", "up"), value.chunk(2, dim=1), strict=True):
                yield f"{layer}ffn_{word}_exps.weight", half.contiguous()


class RefusedError(Exception):
    """``llama_adapter_lora_init`` gave nothing."""


def log_probabilities(
    model: Path, adapter: Path | None, tokens: list[int], scale: float = 1.0
) -> torch.Tensor:
    """Of all next tokens at every place, with an adapter in its own format or without one.

    Raises:
        RefusedError: it does not load the adapter.
    """
    llama_cpp.llama_backend_init()
    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    loaded = llama_cpp.llama_model_load_from_file(
        str(model).encode(), llama_cpp.llama_model_default_params()
    )
    assert loaded, f"llama.cpp does not load {model}"
    asked = llama_cpp.llama_context_default_params()
    asked.n_ctx = asked.n_batch = 64
    asked.n_threads = asked.n_threads_batch = 1
    asked.type_k = asked.type_v = llama_cpp.GGML_TYPE_F32
    asked.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = llama_cpp.llama_init_from_model(loaded, asked)
    try:
        if adapter is not None:
            one = llama_cpp.llama_adapter_lora_init(loaded, str(adapter).encode())
            if not one:
                raise RefusedError(adapter.name)
            ones, scales = (type(one) * 1)(one), (ctypes.c_float * 1)(scale)
            assert llama_cpp.llama_set_adapters_lora(context, ones, 1, scales) == 0
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, i, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        assert llama_cpp.llama_decode(context, batch) == 0
        words = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(loaded))
        rows = [llama_cpp.llama_get_logits_ith(context, i)[:words] for i in range(len(tokens))]
        llama_cpp.llama_batch_free(batch)
    finally:
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(loaded)
    return torch.log_softmax(torch.tensor(rows, dtype=torch.float64), -1)
