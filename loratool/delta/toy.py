"""A tiny llama-shaped model with two adapters and a fine-tune, for tours without a network."""

from __future__ import annotations

import json
from collections.abc import Iterator

import torch
from safetensors.torch import save

_HIDDEN, _INNER, _VOCAB, _LAYERS, _RANK, _TUNED_RANK = 64, 160, 256, 2, 8, 12
_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": _HIDDEN,
    "intermediate_size": _INNER,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": _VOCAB,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


def toy_files() -> Iterator[tuple[str, bytes]]:
    """Name and bytes of each file of ``base/`` (two shards), ``style/``, ``sql/`` and ``tuned/``.

    The same every time.
    """
    generator = torch.Generator().manual_seed(0)
    weights = _weights(generator)
    yield from _model("base", weights)
    for name in ("style", "sql"):
        yield from _adapter(name, weights, generator)
    tuned = dict(weights)
    for name, weight in weights.items():
        if weight.dim() == 2:
            change = _low_rank(weight.shape, generator) * 0.003
            tuned[name] = (weight.float() + change).bfloat16()
    yield from _model("tuned", tuned)


def _weights(generator: torch.Generator) -> dict[str, torch.Tensor]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (_VOCAB, _HIDDEN)}
    for i in range(_LAYERS):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{p}_proj.weight": (_HIDDEN, _HIDDEN) for p in "qkvo"}
        shapes |= {f"{layer}.mlp.{p}_proj.weight": (_INNER, _HIDDEN) for p in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (_HIDDEN, _INNER)
        shapes |= {
            f"{layer}.{n}.weight": (_HIDDEN,)
            for n in ("input_layernorm", "post_attention_layernorm")
        }
    shapes |= {"model.norm.weight": (_HIDDEN,), "lm_head.weight": (_VOCAB, _HIDDEN)}
    return {
        name: torch.ones(shape, dtype=torch.bfloat16)
        if len(shape) == 1
        else (torch.randn(shape, generator=generator) * 0.05).bfloat16()
        for name, shape in shapes.items()
    }


def _low_rank(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    left = torch.randn(shape[0], _TUNED_RANK, generator=generator)
    return left @ torch.randn(_TUNED_RANK, shape[1], generator=generator)


def _model(folder: str, weights: dict[str, torch.Tensor]) -> Iterator[tuple[str, bytes]]:
    names = list(weights)
    half = len(names) // 2
    weight_map: dict[str, str] = {}
    for i, part in enumerate((names[:half], names[half:]), 1):
        file = f"model-{i:05d}-of-00002.safetensors"
        yield f"{folder}/{file}", save({n: weights[n] for n in part}, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    size = sum(w.numel() * w.element_size() for w in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    yield f"{folder}/model.safetensors.index.json", json.dumps(index, indent=2).encode()
    yield f"{folder}/config.json", json.dumps(_CONFIG, indent=2).encode()


def _adapter(
    folder: str, weights: dict[str, torch.Tensor], generator: torch.Generator
) -> Iterator[tuple[str, bytes]]:
    tensors = {}
    for name, weight in weights.items():
        if "_proj" in name:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            rows, cols = weight.shape
            tensors[f"{module}.lora_A.weight"] = torch.randn(_RANK, cols, generator=generator) * 0.1
            tensors[f"{module}.lora_B.weight"] = (
                torch.randn(rows, _RANK, generator=generator) * 0.01
            )
    yield f"{folder}/adapter_model.safetensors", save(tensors, {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base",
        "r": _RANK,
        "lora_alpha": 2 * _RANK,
        "target_modules": sorted({n.split(".")[-2] for n in weights if "_proj" in n}),
        "inference_mode": True,
        "peft_version": "0.21.2",
    }
    yield f"{folder}/adapter_config.json", json.dumps(config, indent=2).encode()
