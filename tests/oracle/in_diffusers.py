"""What the real diffusers makes of a file: the change of every weight, summed in float64.

The model's weights are zeros, and it is float64 from the moment when diffusers has read the file:
what its own `fuse_lora` leaves in them is the change.  The only roundings are those of the numbers
in the file and of what diffusers' converters make of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import loratool as lt

Weights = Mapping[str, torch.Tensor]
EPS = 2 * 2.0**-24
"""Of a term: of two factors each is rounded once, by `convert` or by diffusers' converters."""


def zeroed(model: Any, base: Path) -> None:
    """Make a model's weights zeros, and write them as a base of float64."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    save_file({k: v.double() for k, v in model.state_dict().items()}, str(base))


def in_diffusers(model: Any, loader: str, file: Path) -> tuple[Weights, Weights]:
    """Let a pipeline's loader read a file into a zeroed model, and fuse it.

    Args:
        model: of diffusers, float32.
        loader: class of ``diffusers.loaders.lora_pipeline``.
        file: of adapters.

    Returns:
        Every weight -> ΔW, and those with terms -> Σ|terms|; float64.
    """
    import diffusers

    mixin = getattr(diffusers.loaders.lora_pipeline, loader)
    state, *alphas, metadata = mixin.lora_state_dict(
        str(file), return_alphas=True, return_lora_metadata=True
    )
    assert all("lora" in key for key in state)  # else `load_lora_weights` stops
    part = "unet" if hasattr(mixin, "load_lora_into_unet") else "transformer"
    given = {part: model, "metadata": metadata} | ({"network_alphas": alphas[0]} if alphas else {})
    getattr(mixin, f"load_lora_into_{part}")(state, **given)
    model.double()
    sizes = {}
    for name, layer in model.named_modules():
        for adapter in getattr(layer, "lora_A", ()):
            up, down = (getattr(layer, f"lora_{x}")[adapter].weight.detach() for x in "BA")
            size = abs(layer.scaling[adapter]) * (up.abs().flatten(1) @ down.abs().flatten(1))
            shape = layer.get_base_layer().weight.shape
            sizes[f"{name}.weight"] = size.reshape(shape)
    model.fuse_lora()
    changes = {k.replace(".base_layer", ""): v for k, v in model.state_dict().items()
               if "lora_" not in k}  # fmt: skip
    return changes, sizes


def check(found: tuple[Weights, Weights], source: str | Path, base: Path, folder: Path) -> None:
    """The changes are those that merging the source into zeros makes, and nothing is missing."""
    merged = folder / "merged.safetensors"
    lt.merge([source], base=base, output=merged)
    (changes, sizes), want = found, load_file(str(merged))
    assert sizes and set(changes) == set(want)
    for name, tensor in want.items():
        assert tensor.dtype == torch.float64
        error = (changes[name] - tensor).abs()
        assert bool((error <= EPS * sizes.get(name, torch.zeros(()))).all()), name
        assert float(error.norm()) <= 1e-6 * float(tensor.norm()), name
