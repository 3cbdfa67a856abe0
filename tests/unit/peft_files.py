"""PEFT folders made tensor by tensor, for the traps that PEFT itself would not write."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from loratool.adapter import Adapter, DeltaSpec, TensorData
from loratool.dialects import open_adapter
from loratool.options.groups import Read

PREFIX = "base_model.model."
Tensor = torch.Tensor


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(*shape, dtype=dtype)


def pair(module: str, rank: int = 4, inner: int = 16, out: int = 8) -> dict[str, Tensor]:
    """lora_A and lora_B of a linear module, without the prefix."""
    return {
        f"{module}.lora_A.weight": zeros(rank, inner),
        f"{module}.lora_B.weight": zeros(out, rank),
    }


def write_folder(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, object] | None = None,
    *,
    prefix: str = PREFIX,
    **fields: object,
) -> Path:
    """A folder with adapter_model.safetensors; ``config`` None = LORA, r 4, alpha 8."""
    folder.mkdir(parents=True, exist_ok=True)
    named = {prefix + k: v.contiguous() for k, v in tensors.items()}
    save_file(named, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    base = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "peft_version": "0.21.2"}
    settings = dict(base if config is None else config) | fields
    settings = {k: v for k, v in settings.items() if v is not ...}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def read(
    folder: Path,
    tensors: Mapping[str, Tensor],
    options: Read | None = None,
    *,
    prefix: str = PREFIX,
    **fields: object,
) -> Adapter:
    """Write a folder and open it."""
    return open_adapter(write_folder(folder, tensors, prefix=prefix, **fields), options)


def by_name(adapter: Adapter) -> dict[str, DeltaSpec]:
    return {spec.name: spec for spec in adapter.specs}


def data(tensor: Tensor, name: str = "made") -> TensorData:
    """A tensor in memory as bytes."""
    dtype = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[tensor.dtype]
    flat = tensor.contiguous().view(torch.uint8) if tensor.numel() else tensor
    return TensorData(name, dtype, tuple(tensor.shape), flat.numpy().tobytes())
