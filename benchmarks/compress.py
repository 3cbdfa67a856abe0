"""Resize LoRA 128 -> 32: loratool (files in, files out) against functions in memory.

    python benchmarks/compress.py SD_SCRIPTS [--shapes sdxl|4096] [--repeat N]

SD_SCRIPTS is a checkout of github.com/kohya-ss/sd-scripts (measured with 48d368fa).  Its function
`resize_lora_model` is called as it is, on tensors already in memory; of its imports only those
that this function does not use are replaced.  The naive baseline is the usual short script.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import loratool as lt

SHAPES = {
    "sdxl": [(640, 640), (1280, 1280), (1280, 2048), (640, 2048), (5120, 640), (640, 2560),
             (10240, 1280)],
    "4096": [(4096, 4096)],
}  # fmt: skip
RANK, NEW = 128, 32
Tensors = dict[str, torch.Tensor]


def naive(tensors: Tensors, rank: int) -> Tensors:
    """The short script that everybody writes."""
    out = {}
    for key, A in tensors.items():
        if not key.endswith("lora_A.weight"):
            continue
        name = key.removesuffix("lora_A.weight")
        U, S, Vh = torch.linalg.svd(tensors[f"{name}lora_B.weight"] @ A, full_matrices=False)
        root = S[:rank].sqrt()
        out[f"{name}lora_B.weight"] = (U[:, :rank] * root).contiguous()
        out[f"{name}lora_A.weight"] = (root[:, None] * Vh[:rank]).contiguous()
    return out


def load_kohya(checkout: Path) -> Callable[[Tensors], Tensors]:
    """`resize_lora_model` of a checkout, in memory."""
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


def make(folder: Path, shapes: list[tuple[int, int]]) -> Path:
    """A PEFT adapter with decaying spectra, float32."""
    generator = torch.Generator().manual_seed(0)
    decay = torch.arange(1, RANK + 1) ** -0.5
    tensors = {}
    for i, (out, inner) in enumerate(shapes):
        name = f"base_model.model.m{i}"
        tensors[f"{name}.lora_B.weight"] = torch.randn(out, RANK, generator=generator) * decay
        tensors[f"{name}.lora_A.weight"] = torch.randn(RANK, inner, generator=generator)
    folder.mkdir()
    save_file(tensors, str(folder / "adapter_model.safetensors"), {"format": "pt"})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK,
              "target_modules": [f"m{i}" for i in range(len(shapes))]}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def excess(tensors: Tensors, made: Tensors) -> float:
    """Largest ‖Δ − Δ'‖ / optimum − 1 over the modules; kohya's alpha leaves the scale at 1."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--shapes", choices=SHAPES, default="sdxl")
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    kohya = load_kohya(args.checkout)
    times: dict[str, list[float]] = {"loratool": [], "naive": [], "kohya": []}
    with tempfile.TemporaryDirectory() as work:
        source = make(Path(work) / "in", SHAPES[args.shapes])
        tensors = load_file(str(source / "adapter_model.safetensors"))
        lt.compress(source, output=Path(work) / "warm", rank=NEW)
        results: dict[str, Tensors] = {}
        for turn in range(args.repeat):
            target = Path(work) / f"out{turn}"
            start = time.perf_counter()
            lt.compress(source, output=target, rank=NEW)
            times["loratool"].append(time.perf_counter() - start)
            results["loratool"] = load_file(str(target / "adapter_model.safetensors"))
            for name, function in (("naive", lambda t: naive(t, NEW)), ("kohya", kohya)):
                start = time.perf_counter()
                results[name] = function(tensors)
                times[name].append(time.perf_counter() - start)
        for name, found in times.items():
            ratios = sorted(t / o for t, o in zip(found, times["loratool"], strict=True))
            print(
                f"{name:9} {statistics.median(found):8.3f} s ({min(found):.3f}–{max(found):.3f})  "
                f"{statistics.median(ratios):6.1f} × loratool ({ratios[0]:.1f}–{ratios[-1]:.1f})  "
                f"excess {excess(tensors, results[name]):.1e}"
            )


if __name__ == "__main__":
    main()
