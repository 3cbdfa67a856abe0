"""Models of known shapes with random weights, adapters for them, and a fine-tune.

    python -m benchmarks.models FOLDER SIZE LAYERS [--adapters N] [--rank R] [--tuned]

Weights are bfloat16, cut from one pool of Gaussian numbers; adapters are float32, on all linear
layers; the fine-tune adds a slowly decaying change of rank 64 and rounds.  What is there is kept.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the parent of measured processes stays without torch
    import torch


@dataclass(frozen=True)
class Shape:
    """A Llama-shaped model."""

    hidden: int
    inner: int
    kv: int
    heads: int
    layers: int
    vocab: int
    shards: int = 4


SIZES = {
    "tiny": Shape(128, 320, 64, 4, 2, 256, 2),
    "1.7b": Shape(2048, 5632, 2048, 16, 16, 8000),
    "8b": Shape(4096, 14336, 1024, 32, 32, 128256),
}


def linears(shape: Shape, layers: int) -> dict[str, tuple[int, int]]:
    """Module -> (out, in)."""
    h, i, kv = shape.hidden, shape.inner, shape.kv
    one = {
        "self_attn.q_proj": (h, h), "self_attn.k_proj": (kv, h), "self_attn.v_proj": (kv, h),
        "self_attn.o_proj": (h, h), "mlp.gate_proj": (i, h), "mlp.up_proj": (i, h),
        "mlp.down_proj": (h, i),
    }  # fmt: skip
    return {f"model.layers.{n}.{k}": size for n in range(layers) for k, size in one.items()}


def ensure(
    work: Path,
    size: str,
    layers: int | None = None,
    *,
    adapters: int = 1,
    rank: int = 16,
    tuned: bool = False,
) -> Path:
    """The folder with ``base``, ``adapter0`` … and ``tuned``; made by another process."""
    count = layers or SIZES[size].layers
    folder = work / f"{size}-{count}-r{rank}"
    words = [str(folder), size, str(count), "--adapters", str(adapters), "--rank", str(rank)]
    subprocess.run(
        [sys.executable, "-m", "benchmarks.models", *words, *(["--tuned"] if tuned else [])],
        check=True, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    return folder


def gigabytes(folder: Path) -> float:
    """Size of a checkpoint's tensors."""
    return sum(f.stat().st_size for f in folder.glob("*.safetensors")) / 1e9


class Weights:
    """Tensors cut from one pool; the n-th begins at its own place."""

    def __init__(self, elements: int) -> None:
        import torch

        self.torch = torch
        generator = torch.Generator().manual_seed(0)
        self._pool = (torch.randn(elements, generator=generator) * 0.02).bfloat16()
        self._count = 0

    def draw(self, *shape: int) -> torch.Tensor:
        """The next tensor."""
        self._count += 1
        flat = self.torch.empty(shape, dtype=self.torch.bfloat16).view(-1)
        at, done = self._count * 7919 % len(self._pool), 0
        while done < len(flat):
            part = self._pool[at : at + len(flat) - done]
            flat[done : done + len(part)] = part
            at, done = 0, done + len(part)
        return flat.view(shape)


def shards(shape: Shape, layers: int) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors of the base, shard by shard."""
    weights = Weights(min(1 << 26, 4 * shape.hidden * shape.inner))
    sizes = linears(shape, layers)
    ones = weights.torch.ones(shape.hidden).bfloat16()
    for number in range(shape.shards):
        part = {}
        for layer in range(layers * number // shape.shards, layers * (number + 1) // shape.shards):
            at = f"model.layers.{layer}."
            part |= {f"{n}.weight": weights.draw(*s) for n, s in sizes.items() if n.startswith(at)}
            part |= {f"{at}{n}_layernorm.weight": ones.clone()
                     for n in ("input", "post_attention")}  # fmt: skip
        if number == 0:
            part["model.embed_tokens.weight"] = weights.draw(shape.vocab, shape.hidden)
        if number == shape.shards - 1:
            part["model.norm.weight"] = ones
            part["lm_head.weight"] = weights.draw(shape.vocab, shape.hidden)
        yield part


def changed(part: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A fine-tune's tensors: 1.5 % of the norm of every projection."""
    import torch

    generator = torch.Generator().manual_seed(1)
    decay = 1 / torch.arange(1, 65) ** 0.6
    made = dict(part)
    for name, weight in part.items():
        if "_proj" in name:
            left = torch.randn(weight.shape[0], 64, generator=generator) * decay
            change = left @ torch.randn(64, weight.shape[1], generator=generator)
            change *= 0.015 * torch.linalg.vector_norm(weight, dtype=torch.float32) / change.norm()
            made[name] = change.add_(weight).bfloat16()
    return made


def save_checkpoints(folder: Path, shape: Shape, layers: int, tuned: bool) -> None:
    """Write ``base``, and ``tuned`` where asked for."""
    from safetensors.torch import save_file

    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "hidden_size": shape.hidden, "intermediate_size": shape.inner,
        "num_hidden_layers": layers, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv * shape.heads // shape.hidden, "vocab_size": shape.vocab,
        "tie_word_embeddings": False, "dtype": "bfloat16", "max_position_embeddings": 2048,
    }  # fmt: skip
    weight_map: dict[str, str] = {}
    size = 0
    names = ["base", *(["tuned"] if tuned else [])]
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(config))
    for number, part in enumerate(shards(shape, layers), 1):
        file = f"model-{number:05d}-of-{shape.shards:05d}.safetensors"
        weight_map |= dict.fromkeys(part, file)
        size += sum(t.nbytes for t in part.values())
        save_file(part, str(folder / "base" / file), {"format": "pt"})
        if tuned:
            save_file(changed(part), str(folder / "tuned" / file), {"format": "pt"})
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    for name in names:  # last: a checkpoint with an index is complete
        (folder / name / "model.safetensors.index.json").write_text(json.dumps(index))


def save_adapter(
    folder: Path, sizes: dict[str, tuple[int, int]], rank: int, seed: int, alpha: int | None = None
) -> Path:
    """Write a PEFT adapter, float32, with spectra that decay as a trained one's do."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    decay = 0.01 / torch.arange(1, rank + 1) ** 0.5
    tensors = {}
    for name, (out, inner) in sizes.items():
        key = f"base_model.model.{name}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(rank, inner, generator=generator) * 0.02
        tensors[f"{key}.lora_B.weight"] = torch.randn(out, rank, generator=generator) * decay
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(folder / "adapter_model.safetensors"), {"format": "pt"})
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": alpha or 2 * rank,
        "target_modules": sorted({name.rsplit(".", 1)[-1] for name in sizes}),
        "base_model_name_or_path": "base", "peft_version": "0.21.2",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("layers", type=int)
    parser.add_argument("--adapters", type=int, default=1)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tuned", action="store_true")
    asked = parser.parse_args()
    shape = SIZES[asked.size]
    wanted = ["base", *(["tuned"] if asked.tuned else [])]
    if not all((asked.folder / n / "model.safetensors.index.json").exists() for n in wanted):
        save_checkpoints(asked.folder, shape, asked.layers, asked.tuned)
    for number in range(asked.adapters):
        folder = asked.folder / f"adapter{number}"
        if not (folder / "adapter_config.json").exists():
            save_adapter(folder, linears(shape, asked.layers), asked.rank, seed=number)


if __name__ == "__main__":
    main()
