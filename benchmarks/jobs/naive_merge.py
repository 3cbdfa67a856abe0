"""The short script that everybody writes, ADAPTER BASE OUT: float32 sums, all cores of torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file


def merge(adapter: Path, base: Path, out: Path) -> None:
    out.mkdir()
    with safe_open(str(adapter / "adapter_model.safetensors"), "pt") as factors:
        known = set(factors.keys())
        for shard in sorted(base.glob("*.safetensors")):
            part = {}
            with safe_open(str(shard), "pt") as weights:
                for name in weights.keys():  # noqa: SIM118
                    weight = weights.get_tensor(name)
                    key = f"base_model.model.{name.removesuffix('.weight')}"
                    if f"{key}.lora_A.weight" in known:
                        lora_A = factors.get_tensor(f"{key}.lora_A.weight")
                        lora_B = factors.get_tensor(f"{key}.lora_B.weight")
                        weight = torch.addmm(weight.float(), lora_B, lora_A, alpha=2).bfloat16()
                    part[name] = weight
            save_file(part, str(out / shard.name), {"format": "pt"})


def prepare(arguments: list[str]) -> Callable[[], None]:
    adapter, base, out = map(Path, arguments)
    return lambda: merge(adapter, base, out)
