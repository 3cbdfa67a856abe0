"""An adapter folder inside real PEFT: does every tensor arrive, and what does it change?"""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]


class NotLoadedError(Exception):
    """PEFT left out a tensor of the file, or missed one."""


def randomise(model: Any, seed: int, scale: float = 0.1) -> Any:
    """Random values for everything that an adapter trains."""
    random = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.requires_grad or ".lora_" in name:
            p.data += (scale * torch.randn(p.shape, generator=random)).to(p.dtype)
    return model


def make(model: Any, folder: Path, config: Any, seed: int = 1) -> Path:
    """An adapter by PEFT with random values."""
    wrapped = peft.get_peft_model(copy.deepcopy(model), copy.deepcopy(config))
    return save(randomise(wrapped, seed), folder)


def save(wrapped: Any, folder: Path) -> Path:
    """An adapter as PEFT writes it, less the card, which takes longer than all the rest."""
    wrapped.create_or_update_model_card = lambda _: None
    wrapped.save_pretrained(str(folder))
    return folder


def save_base(model: Any, folder: Path) -> Path:
    """A checkpoint folder of a transformers model, or of any module."""
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(str(folder))
        return folder
    folder.mkdir(parents=True)
    tensors = {k: v.detach().clone().contiguous() for k, v in model.state_dict().items()}
    save_file(tensors, str(folder / "model.safetensors"))
    return folder


def load_strict(model: Any, folder: Path, *, dtype: torch.dtype = torch.float64) -> Any:
    """PeftModel in which every tensor of the file has arrived.

    Raises:
        NotLoadedError: a tensor did not arrive, or PEFT missed one.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model).to(dtype), str(folder))
    said = [str(w.message) for w in caught if "missing adapter keys" in str(w.message)]
    stored = load_file(str(folder / "adapter_model.safetensors"))
    have = loaded.state_dict() | dict(peft.get_peft_model_state_dict(loaded))
    absent = [k for k in stored if k not in have]
    moved = [
        k for k in stored if k in have and not torch.equal(have[k].double(), stored[k].double())
    ]
    if said or absent or moved:
        raise NotLoadedError(f"{said[:1]} absent {absent[:3]} other values {moved[:3]}")
    return loaded.to(dtype).eval()


def merged(loaded: Any) -> Tensors:
    """The weights with the adapter in them."""
    found = copy.deepcopy(loaded).merge_and_unload().state_dict()
    return {k: v for k, v in found.items() if isinstance(v, torch.Tensor)}


def changes(model: Any, folder: Path, *, strict: bool = True) -> Tensors:
    """W' − W of every float tensor, in float64.

    Args:
        model: the base.
        folder: the adapter.
        strict: False for experts by number, which PEFT fuses when it loads them.
    """
    base = model.state_dict()
    loaded = load_strict(model, folder) if strict else peft.PeftModel.from_pretrained(
        copy.deepcopy(model).double(), str(folder)
    ).double()  # fmt: skip
    return {
        k: v.double() - base[k].double()
        for k, v in loaded.merge_and_unload().state_dict().items()
        if isinstance(v, torch.Tensor) and k in base and base[k].is_floating_point()
        and v.shape == base[k].shape
    }  # fmt: skip


def distance(found: Tensors, wanted: Tensors) -> float:
    """Largest ‖found − wanted‖ / ‖wanted‖ of any tensor; against the largest where nothing is."""
    size = max((float(v.norm()) for v in wanted.values()), default=0.0) or 1.0
    worst = 0.0
    for name, value in wanted.items():
        norm = float(value.norm())
        off = float((found[name] - value).norm())
        worst = max(worst, off / norm if norm > 1e-12 * size else off / size)
    return worst


def config_of(folder: Path) -> dict[str, Any]:
    """``adapter_config.json``."""
    found = json.loads((folder / "adapter_config.json").read_text())
    assert isinstance(found, dict)
    return found
