"""A small language model, its fine-tune, and adapters that are alike in part: for pictures."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

LAYERS, HIDDEN, INNER, KEYS = 24, 256, 704, 64
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}  # fmt: skip
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
    "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 1, "vocab_size": 1000, "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}  # fmt: skip
Factors = dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]


def make_models(folder: Path) -> None:
    """``base``, ``tuned``, ``style`` and ``sql`` in a folder."""
    rng = torch.Generator().manual_seed(3)
    base = {
        f"model.layers.{i}.{name}.weight": torch.randn(o, k, generator=rng) / k**0.5
        for i in range(LAYERS) for name, (o, k) in SHAPES.items()
    }  # fmt: skip
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        base[name] = torch.randn(1000, HIDDEN, generator=rng) * 0.02
    write_model(folder / "base", base)
    style = factors(1)
    write_adapter(folder / "style", style)
    write_adapter(folder / "sql", factors(2, style))
    for (i, name), (A, B) in style.items():  # from what the base's file holds
        key = f"model.layers.{i}.{name}.weight"
        base[key] = base[key].bfloat16() + 2 * (B @ A)
    write_model(folder / "tuned", base)


def factors(seed: int, other: Factors | None = None, rank: int = 16) -> Factors:
    """Random factors, strongest in the middle, where they may be another adapter's."""
    rng = torch.Generator().manual_seed(seed)
    found: Factors = {}
    for i in range(LAYERS):
        bump = 0.3 + 1.2 * torch.exp(torch.tensor(-(((i - 15) / 6) ** 2))).item()
        for j, (name, (out, inner)) in enumerate(SHAPES.items()):
            A = torch.randn(rank, inner, generator=rng) / inner**0.5
            A = A * torch.logspace(0, -1.2, rank)[:, None]
            B = torch.randn(out, rank, generator=rng) * torch.logspace(0, -0.8, rank)
            B = B * 0.05 * bump * (1 + 0.5 * (j % 3))
            if other is not None:
                part = 0.1 + 0.5 * bump * (1 - 0.12 * j)  # alike in the middle, less so by family
                A, B = (part * its + (1 - part) * mine
                        for mine, its in zip((A, B), other[i, name], strict=True))  # fmt: skip
            found[i, name] = (A, B)
    return found


def write_model(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir()
    save_file({k: v.bfloat16() for k, v in tensors.items()}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    (folder / "config.json").write_text(json.dumps(CONFIG))


def write_adapter(folder: Path, found: Factors) -> None:
    folder.mkdir()
    rank = next(iter(found.values()))[0].shape[0]
    save_file({
        f"base_model.model.model.layers.{i}.{name}.lora_{side}.weight": tensor.contiguous()
        for (i, name), pair in found.items() for side, tensor in zip("AB", pair, strict=True)
    }, folder / "adapter_model.safetensors")  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "task_type": "CAUSAL_LM",
        "target_modules": [name.partition(".")[2] for name in SHAPES], "bias": "none",
        "base_model_name_or_path": "demo/llama-24",
    }))  # fmt: skip
