"""Image adapters with dotted names in plain numpy: what their tensors mean, in float64."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file

Array = np.ndarray
_OLD = re.compile(r"(.+)\.processor\.to_(q|k|v|out)_lora\.(down|up)\.weight")
_DOWN = ("lora_down", "lora\\.down", "lora_linear_layer\\.down", "down")
_UP = tuple(way.replace("down", "up") for way in _DOWN)
_ENDS = (
    (rf"lora_A(\.\w+)?(\.weight)?|({'|'.join(_DOWN)})\.weight", "A"),
    (rf"lora_B(\.\w+)?\.weight|lora_B|({'|'.join(_UP)})\.weight", "B"),
    (r"lora_B(\.\w+)?\.bias", "bias"), (r"lora_magnitude_vector|magnitude|dora_scale", "lengths"),
    (r"alpha", "alpha"), (r"(query|key)_norm\.scale", "set"),
    (r"diff_b", "diff_b"), (r"diff", "diff"),
)  # fmt: skip


def parts_of(path: Path) -> dict[str, dict[str, Array]]:
    """Module -> what of it the file holds, in float64."""
    found: dict[str, dict[str, Array]] = {}
    for name, tensor in load_file(str(path)).items():
        if old := _OLD.fullmatch(name):
            leaf = "to_out.0" if old[2] == "out" else f"to_{old[2]}"
            module, what = f"{old[1]}.{leaf}", "A" if old[3] == "down" else "B"
        else:
            module, what = next((m[1], what) for end, what in _ENDS
                                if (m := re.fullmatch(rf"(.+?)\.(?:{end})", name)))  # fmt: skip
        found.setdefault(module, {})[what] = tensor.astype(np.float64)
    return found


def stated(path: Path) -> Callable[[str, int], float]:
    """(module behind its part, r) -> the factor that the header states, 1 without one."""
    with safe_open(str(path), "np") as file:
        text = (file.metadata() or {}).get("lora_adapter_metadata")
    if text is None:
        return lambda module, rank: 1.0
    config = {k.split(".", 1)[-1]: v for k, v in json.loads(text).items()}

    def factor(module: str, rank: int) -> float:
        table: Mapping[str, float] = config["alpha_pattern"]
        hit = next((k for k in table if re.fullmatch(rf"(.*\.)?({k})", module)), None)
        alpha = config["lora_alpha"] if hit is None else table[hit]
        return float(alpha) / (rank**0.5 if config["use_rslora"] else rank)

    return factor


def product(part: Mapping[str, Array], scale: float) -> Array:
    """scale · B @ A in the shape of the weight."""
    right, left = part["A"], part["B"]
    flat = left.reshape(left.shape[0], -1) @ right.reshape(right.shape[0], -1)
    return scale * flat.reshape(left.shape[0], *right.shape[1:])


def deltas(path: Path) -> dict[tuple[str, str], tuple[Array, Array]]:
    """(module as in the file, parameter) -> (ΔW, Σ|terms|); DoRA is not among them."""
    found, factor = {}, stated(path)
    for module, part in parts_of(path).items():
        if "B" in part:
            rank = part["A"].shape[0]
            scale = factor(module.split(".", 1)[-1], rank)
            if "alpha" in part:
                scale = part["alpha"].item() / rank
            size = product({k: abs(v) for k, v in part.items()}, scale)
            found[module, "weight"] = product(part, scale), size
            if "bias" in part:
                found[module, "bias"] = scale * part["bias"], abs(scale * part["bias"])
        elif "A" in part:  # ai-toolkit: a factor without its partner is the whole change
            found[module, "weight"] = part["A"], abs(part["A"])
        for what, parameter in (("diff", "weight"), ("diff_b", "bias")):
            if what in part:
                found[module, parameter] = part[what], abs(part[what])
    return found
