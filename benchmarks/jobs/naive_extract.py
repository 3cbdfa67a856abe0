"""What a short script does, TUNED BASE OUT RANK: one dense SVD per matrix."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file


def extract(tuned: Path, base: Path, out: Path, rank: int) -> None:
    factors = {}
    for shard in sorted(base.glob("*.safetensors")):
        with safe_open(shard, "pt") as old, safe_open(tuned / shard.name, "pt") as new:
            for name in old.keys():  # noqa: SIM118
                delta = new.get_tensor(name).float() - old.get_tensor(name).float()
                if delta.dim() == 2 and delta.any():
                    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
                    key = f"base_model.model.{name.removesuffix('.weight')}"
                    root = S[:rank].sqrt()
                    factors[f"{key}.lora_B.weight"] = (U[:, :rank] * root).contiguous()
                    factors[f"{key}.lora_A.weight"] = (root[:, None] * Vh[:rank]).contiguous()
    out.mkdir()
    save_file(factors, str(out / "adapter_model.safetensors"), {"format": "pt"})


def prepare(arguments: list[str]) -> Callable[[], None]:
    tuned, base, out = map(Path, arguments[:3])
    return lambda: extract(tuned, base, out, int(arguments[3]))
