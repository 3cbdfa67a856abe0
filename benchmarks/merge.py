"""Merge one adapter into a sharded bfloat16 model: loratool beside PEFT, a naive script and cp.

    python benchmarks/merge.py [--reps 5] [--layers 16] [--device cuda] [--dir DIR] [--skip peft]

Every method runs in a fresh process, in turn (A B C D A B C D …), its output synced to disk, its
time taken inside the process after the imports.  Ratios are taken repetition by repetition.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HIDDEN, INNER, VOCAB, HEADS, RANK, SHARDS = 2048, 5632, 8000, 16, 16, 4
KINDS = {
    "q": (HIDDEN, HIDDEN), "k": (HIDDEN, HIDDEN), "v": (HIDDEN, HIDDEN), "o": (HIDDEN, HIDDEN),
    "gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER),
}  # fmt: skip


def module(layer: int, kind: str) -> str:
    block = "self_attn" if kind in "qkvo" else "mlp"
    return f"model.layers.{layer}.{block}.{kind}_proj"


def make_model(folder: Path, layers: int) -> None:
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.02).bfloat16()

    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    adapter.mkdir()
    weight_map, size = {}, 0
    for shard in range(SHARDS):
        part = {}
        for layer in range(layers * shard // SHARDS, layers * (shard + 1) // SHARDS):
            for kind, shape in KINDS.items():
                part[f"{module(layer, kind)}.weight"] = draw(*shape)
            for norm in ("input_layernorm", "post_attention_layernorm"):
                part[f"model.layers.{layer}.{norm}.weight"] = torch.ones(HIDDEN).bfloat16()
        if shard == 0:
            part["model.embed_tokens.weight"] = draw(VOCAB, HIDDEN)
        if shard == SHARDS - 1:
            part["model.norm.weight"] = torch.ones(HIDDEN).bfloat16()
            part["lm_head.weight"] = draw(VOCAB, HIDDEN)
        name = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        save_file(part, str(base / name), {"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
        size += sum(t.numel() * 2 for t in part.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": INNER, "num_hidden_layers": layers, "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS, "vocab_size": VOCAB, "tie_word_embeddings": False,
        "dtype": "bfloat16", "max_position_embeddings": 2048,
    }  # fmt: skip
    (base / "config.json").write_text(json.dumps(config))
    factors = {}
    for layer in range(layers):
        for kind, (out, inner) in KINDS.items():
            key = f"base_model.model.{module(layer, kind)}"
            factors[f"{key}.lora_A.weight"] = torch.randn(RANK, inner, generator=generator) * 0.02
            factors[f"{key}.lora_B.weight"] = torch.randn(out, RANK, generator=generator) * 0.01
    save_file(factors, str(adapter / "adapter_model.safetensors"), {"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK,
        "target_modules": [f"{k}_proj" for k in KINDS], "base_model_name_or_path": str(base),
        "peft_version": "0.21.2",
    }  # fmt: skip
    (adapter / "adapter_config.json").write_text(json.dumps(config))


def sync_tree(path: Path) -> None:
    for file in [*path.rglob("*"), path]:
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def run_cp(folder: Path, out: Path, device: str) -> float:
    start = time.perf_counter()
    subprocess.run(["cp", "-r", "--reflink=never", str(folder / "base"), str(out)], check=True)
    sync_tree(out)
    return time.perf_counter() - start


def run_loratool(folder: Path, out: Path, device: str) -> float:
    import torch

    import loratool as lt

    lt.merge  # noqa: B018  resolve the lazy import
    if device != "cpu":
        torch.zeros(1, device=device)
    start = time.perf_counter()
    lt.merge([str(folder / "adapter")], base=str(folder / "base"), output=out, device=device)
    return time.perf_counter() - start


def run_naive(folder: Path, out: Path, device: str) -> float:
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    start = time.perf_counter()
    out.mkdir()
    with safe_open(str(folder / "adapter" / "adapter_model.safetensors"), "pt") as factors:
        known = set(factors.keys())
        for shard in sorted((folder / "base").glob("*.safetensors")):
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
    sync_tree(out)
    return time.perf_counter() - start


def run_peft(folder: Path, out: Path, device: str) -> float:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from transformers.models.llama import modeling_llama  # noqa: F401  count imports aside

    if device != "cpu":
        torch.zeros(1, device=device)
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        str(folder / "base"), dtype=torch.bfloat16, device_map=device if device != "cpu" else None
    )
    merged = PeftModel.from_pretrained(model, str(folder / "adapter")).merge_and_unload()
    merged.save_pretrained(str(out), max_shard_size="500MB")
    sync_tree(out)
    return time.perf_counter() - start


METHODS = {"cp": run_cp, "loratool": run_loratool, "naive": run_naive, "peft": run_peft}
ON_GPU = ("loratool", "peft")  # with --device cuda these run there as well


def measure(method: str, folder: Path, device: str) -> tuple[float, float]:
    """(seconds, peak resident MB) of one method in a fresh process."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    done = subprocess.run(
        [sys.executable, __file__, "--one", method, "--dir", str(folder), "--device", device],
        capture_output=True, text=True, check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    shutil.rmtree(out, ignore_errors=True)
    seconds, peak = done.stdout.split()[-2:]
    return float(seconds), float(peak)


def one(method: str, folder: Path, device: str) -> None:
    import resource

    seconds = METHODS[method](folder, folder / "out", device)
    print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--warm-up", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dir", type=Path)
    parser.add_argument("--skip", action="append", default=[])
    parser.add_argument("--one")
    args = parser.parse_args()
    if args.one:
        one(args.one, args.dir, args.device)
        return
    with tempfile.TemporaryDirectory(dir=args.dir) as temporary:
        folder = Path(temporary)
        # In a process of its own: a child's peak memory starts at its parent's.
        maker = multiprocessing.get_context("spawn").Process(
            target=make_model, args=(folder, args.layers)
        )
        maker.start()
        maker.join()
        size = sum(f.stat().st_size for f in (folder / "base").glob("*.safetensors"))
        print(f"model {size / 1e9:.2f} GB bfloat16 in {SHARDS} shards, rank {RANK}, {args.device}")
        names = [m for m in METHODS if m not in args.skip]
        if args.device != "cpu":
            names += [f"{m}@{args.device}" for m in ON_GPU if m not in args.skip]
        times: dict[str, list[float]] = {n: [] for n in names}
        peaks: dict[str, list[float]] = {n: [] for n in names}
        for rep in range(-args.warm_up, args.reps):  # the first round warms the page cache
            for name in names:
                method, _, device = name.partition("@")
                seconds, peak = measure(method, folder, device or "cpu")
                if rep >= 0:
                    times[name].append(seconds)
                    peaks[name].append(peak)
        print(f"{'':10} {'median s':>9} {'min':>7} {'max':>7} {'peak MB':>8}  ours / it")
        for name in names:
            ratios = [a / b for a, b in zip(times["loratool"], times[name], strict=True)]
            print(
                f"{name:10} {statistics.median(times[name]):9.2f} {min(times[name]):7.2f} "
                f"{max(times[name]):7.2f} {max(peaks[name]):8.0f}  "
                f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
            )


if __name__ == "__main__":
    main()
