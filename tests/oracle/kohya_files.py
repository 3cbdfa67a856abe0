"""kohya and LyCORIS files in plain numpy: what their tensors mean, in float64."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

SAMPLES = Path(__file__).parents[1] / "data" / "diffusion"
Array = np.ndarray


def adapter_of(name: str) -> Path:
    return SAMPLES / name / "adapter.safetensors"


def deltas(path: Path) -> dict[tuple[str, str], tuple[Array, Array]]:
    """(stem of the keys, parameter) -> (ΔW, Σ|terms|), as the formulas of the dialect say."""
    tensors = load_file(str(path))
    found: dict[tuple[str, str], tuple[Array, Array]] = {}
    for stem in dict.fromkeys(key.split(".", 1)[0] for key in tensors):
        mine = {k.split(".", 1)[1]: v.astype(np.float64) for k, v in tensors.items()
                if k.split(".", 1)[0] == stem}  # fmt: skip
        if "lora_up.weight" in mine:
            size = product({k: abs(v) for k, v in mine.items()})
            found[stem, "weight"] = product(mine), size
        for suffix, parameter in (("w_norm", "weight"), ("b_norm", "bias")):
            if suffix in mine:
                found[stem, parameter] = mine[suffix], abs(mine[suffix])
    return found


def product(mine: Mapping[str, Array]) -> Array:
    """alpha/r · up · (mid) · down, in the shape of the weight."""
    up, down, mid = mine["lora_up.weight"], mine["lora_down.weight"], mine.get("lora_mid.weight")
    scale = mine.get("alpha", np.array(down.shape[0])).item() / down.shape[0]
    left = up.reshape(up.shape[0], -1)
    if mid is not None:
        right = down.reshape(down.shape[0], -1)
        return scale * np.einsum("mn...,om,ni->oi...", mid, left, right)
    return scale * (left @ down.reshape(down.shape[0], -1)).reshape(up.shape[0], *down.shape[1:])


def rounded_once(got: Array, weight: Array, delta: Array, size: Array) -> bool:
    """Is every element the nearest float32 of the exact sum, but for the sum's own rounding?

    The sum runs in float64 over at most 100 terms, so it is off by less than 2⁻⁴⁵ of Σ|terms|.
    """
    exact = weight.astype(np.float64) + delta.reshape(weight.shape)
    slack = 2.0**-45 * (abs(weight) + size.reshape(weight.shape))
    half = np.spacing(abs(exact).astype(np.float32)).astype(np.float64) / 2
    return bool((abs(got.astype(np.float64) - exact) <= half + slack).all())


def near(got: Array, reference: Array, weight: Array, size: Array, rank: int) -> bool:
    """Do two results agree, one of which was summed up in float32 over ``rank`` terms?"""
    bound = (rank + 4) * 2.0**-24 * (abs(weight) + size.reshape(weight.shape)) + 2.0**-126
    return bool((abs(got.astype(np.float64) - reference.astype(np.float64)) <= bound).all())
