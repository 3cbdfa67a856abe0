"""Small checkpoints and adapters, built by code from a seed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed)) * scale


def save_checkpoint(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    shards: int = 1,
    config: Mapping[str, object] | None = None,
) -> Path:
    """Write tensors as a model folder, cut into ``shards`` files in order."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dict(config or {"model_type": "test"})))
    names = list(tensors)
    if shards == 1:
        save_file(dict(tensors), str(folder / "model.safetensors"), metadata={"format": "pt"})
        return folder
    size = -(-len(names) // shards)
    weight_map = {}
    for i in range(shards):
        name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {n: tensors[n] for n in names[i * size : (i + 1) * size]}
        save_file(part, str(folder / name), metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def save_adapter(
    folder: Path,
    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    *,
    alpha: float = 16,
    extra: Mapping[str, torch.Tensor] | None = None,
    **config: object,
) -> Path:
    """Write a PEFT LoRA folder: module -> (lora_A, lora_B)."""
    folder.mkdir(parents=True)
    tensors = {}
    for module, (lora_A, lora_B) in factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = lora_A
        tensors[f"base_model.model.{module}.lora_B.weight"] = lora_B
    for name, tensor in (extra or {}).items():
        tensors[f"base_model.model.{name}"] = tensor
    rank = next(iter(factors.values()))[0].shape[0] if factors else 1
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(factors),
        "peft_version": "0.21.2",
    } | config
    save_file(
        {k: v.contiguous() for k, v in tensors.items()},
        str(folder / "adapter_model.safetensors"),
        metadata={"format": "pt"},
    )
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def with_whole(source: Path, folder: Path, tensor: str, base: Path) -> Path:
    """A copy of a PEFT folder that holds a tensor of the base's whole."""
    shutil.copytree(source, folder)
    file = folder / "adapter_model.safetensors"
    tensors = {k: v for f in base.glob("*.safetensors") for k, v in load_file(str(f)).items()}
    held = {**load_file(str(file)), f"base_model.model.{tensor}": tensors[tensor]}
    save_file(held, str(file), {"format": "pt"})
    return folder


def random_factors(
    shapes: Mapping[str, Sequence[int]], *, rank: int, seed: int, scale: float = 0.05
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """module -> (out, in) gives module -> (lora_A (r, in), lora_B (out, r))."""
    return {
        name: (
            randn(rank, inner, seed=seed + 2 * i, scale=scale),
            randn(out, rank, seed=seed + 2 * i + 1, scale=scale),
        )
        for i, (name, (out, inner)) in enumerate(shapes.items())
    }


def exact_round(value: Fraction, bits: int, min_exponent: int) -> Fraction:
    """Round to nearest, ties to even, by the definition."""
    if value == 0:
        return Fraction(0)
    exponent = value.numerator.bit_length() - value.denominator.bit_length()  # or one more
    if abs(value) < Fraction(2) ** exponent:
        exponent -= 1
    exponent = max(exponent, min_exponent)
    unit = Fraction(2) ** (exponent - bits + 1)
    return round(value / unit) * unit  # Python's round of a Fraction is half-to-even
