"""Relative error over all matrices of an extracted adapter, printed: FOLDER OUT."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file


def error_of(folder: Path, output: Path) -> float:
    factors = load_file(str(output / "adapter_model.safetensors"))
    lost = whole = 0.0
    for shard in sorted((folder / "base").glob("*.safetensors")):
        with safe_open(shard, "pt") as old, safe_open(folder / "tuned" / shard.name, "pt") as new:
            for name in old.keys():  # noqa: SIM118
                key = f"base_model.model.{name.removesuffix('.weight')}"
                if f"{key}.lora_A.weight" in factors and "proj" in name:
                    delta = new.get_tensor(name).float() - old.get_tensor(name).float()
                    lora_A, lora_B = (factors[f"{key}.lora_{x}.weight"].float() for x in "AB")
                    whole += float(delta.square().sum(dtype=torch.float64))
                    delta -= lora_B @ lora_A
                    lost += float(delta.square().sum(dtype=torch.float64))
    return math.sqrt(lost / whole)


if __name__ == "__main__":
    print(error_of(Path(sys.argv[1]), Path(sys.argv[2])))
