"""Resize SOURCE from rank 128 to 32: SOURCE ours OUT | SOURCE naive | SOURCE kohya CHECKOUT.

As a script, SOURCE SHAPES: makes the adapter.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

import loratool as lt
from benchmarks.models import save_adapter

SHAPES = {
    "sdxl": [(640, 640), (1280, 1280), (1280, 2048), (640, 2048), (5120, 640), (640, 2560),
             (10240, 1280)],
    "4096": [(4096, 4096)],
}  # fmt: skip
RANK, NEW = 128, 32
FILE = "adapter_model.safetensors"
Tensors = dict[str, torch.Tensor]


def naive(tensors: Tensors) -> Tensors:
    """The short script that everybody writes."""
    out = {}
    for key, A in tensors.items():
        if not key.endswith("lora_A.weight"):
            continue
        name = key.removesuffix("lora_A.weight")
        U, S, Vh = torch.linalg.svd(tensors[f"{name}lora_B.weight"] @ A, full_matrices=False)
        root = S[:NEW].sqrt()
        out[f"{name}lora_B.weight"] = (U[:, :NEW] * root).contiguous()
        out[f"{name}lora_A.weight"] = (root[:, None] * Vh[:NEW]).contiguous()
    return out


def load_kohya(checkout: Path) -> Callable[[Tensors], Tensors]:
    """`resize_lora_model` of a checkout; of its imports only unused ones are replaced."""
    for name in ("library", "library.train_util", "library.model_util", "library.utils"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["library"].train_util = sys.modules["library.train_util"]  # type: ignore[attr-defined]
    sys.modules["library"].model_util = sys.modules["library.model_util"]  # type: ignore[attr-defined]
    sys.modules["library.utils"].setup_logging = lambda: None  # type: ignore[attr-defined]
    spec = importlib.util.spec_from_file_location(
        "resize_lora", checkout / "networks" / "resize_lora.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    logging.disable(logging.INFO)

    def run(tensors: Tensors) -> Tensors:
        found: Tensors = module.resize_lora_model(
            dict(tensors), NEW, NEW, torch.float32, "cpu", None, None, False
        )[0]
        return found

    return run


def excess(tensors: Tensors, made: Tensors) -> float:
    """Largest ‖Δ − Δ'‖ / optimum − 1 over the modules, both at the source's scale."""
    worst = -1.0
    for key in tensors:
        if key.endswith("lora_A.weight"):
            other = key.replace("lora_A", "lora_B")
            R = torch.linalg.qr(tensors[other].double()).R
            L = torch.linalg.qr(tensors[key].double().T).R
            optimum = float(torch.linalg.svdvals(R @ L.T)[NEW:].norm())
            D = tensors[other].double() @ tensors[key].double()
            error = float((D - made[other].double() @ made[key].double()).norm())
            worst = max(worst, error / optimum - 1)
    return worst


def prepare(arguments: list[str]) -> Callable[[], dict[str, float]]:
    source, method, *rest = arguments
    tensors = load_file(f"{source}/{FILE}")

    def compress(_: Tensors) -> Tensors:
        lt.compress(source, output=rest[0], rank=NEW)
        return {}

    calls = {"ours": compress, "naive": naive}
    call = load_kohya(Path(rest[0])) if method == "kohya" else calls[method]
    if method == "ours":
        _ = lt.compress

    def work() -> dict[str, float]:
        start = time.perf_counter()
        made = call(tensors)
        seconds = time.perf_counter() - start
        made = made or load_file(f"{rest[0]}/{FILE}")
        return {"job": seconds, "excess × 1e12": excess(tensors, made) * 1e12}

    return work


if __name__ == "__main__":
    shapes = {f"m{i}": shape for i, shape in enumerate(SHAPES[sys.argv[2]])}
    save_adapter(Path(sys.argv[1]), shapes, RANK, seed=0, alpha=RANK)
