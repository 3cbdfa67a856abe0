"""Extract a LoRA adapter from a bfloat16 fine-tune: loratool beside mergekit and a naive script.

    python benchmarks/extract.py [--reps 5] [--layers 2] [--rank 32] [--peer-python PYTHON]
    python benchmarks/extract.py --shape 8b --device cuda --dir /dev/shm [--layers 32]

On the CPU: whole processes, imports included, in turn (A B C A B C …); ratios are taken
repetition by repetition.  ``--peer-python`` is an interpreter with mergekit 0.1.5 (a virtual
environment of its own will do); without it mergekit is skipped.

With ``--device cuda``: our job after imports and CUDA start, beside the best parallel read of
both checkpoints (into reused buffers, 1 to 16 threads), same files, in turn.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

SHAPES = {
    "1.7b": {"hidden": 2048, "inner": 5632, "kv": 2048, "heads": 16, "vocab": 8000},
    "8b": {"hidden": 4096, "inner": 14336, "kv": 1024, "heads": 32, "vocab": 8000},
}


def matrices(shape: dict[str, int]) -> dict[str, tuple[int, int]]:
    h, i, kv = shape["hidden"], shape["inner"], shape["kv"]
    return {
        "self_attn.q_proj": (h, h), "self_attn.k_proj": (kv, h), "self_attn.v_proj": (kv, h),
        "self_attn.o_proj": (h, h), "mlp.gate_proj": (i, h), "mlp.up_proj": (i, h),
        "mlp.down_proj": (h, i),
    }  # fmt: skip


def make_pair(folder: Path, shape: dict[str, int], layers: int, device: str) -> None:
    """Base and fine-tune: Gaussian weights, a slowly decaying rank-64 change and rounding."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device)

    decay = 1 / torch.arange(1, 65, device=device) ** 0.6
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "hidden_size": shape["hidden"], "intermediate_size": shape["inner"],
        "num_hidden_layers": layers, "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv"] * shape["heads"] // shape["hidden"],
        "vocab_size": shape["vocab"], "tie_word_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip
    maps: dict[str, dict[str, str]] = {"base": {}, "tuned": {}}
    for name in maps:
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config))
    shards = [[f"layers.{n}" for n in range(i, min(i + 4, layers))] for i in range(0, layers, 4)]
    for number, blocks in enumerate([*shards, ["rest"]], 1):
        base: dict[str, torch.Tensor] = {}
        tuned: dict[str, torch.Tensor] = {}
        for block in blocks:
            for name, (rows, cols) in matrices(shape).items() if block != "rest" else ():
                weight = (draw(rows, cols) * 0.02).bfloat16()
                change = (draw(rows, 64) * decay) @ draw(64, cols)
                change *= 0.015 * weight.float().norm() / change.norm()
                key = f"model.{block}.{name}.weight"
                base[key] = weight.cpu()
                tuned[key] = (weight.float() + change).bfloat16().cpu()
            for norm in ("input_layernorm", "post_attention_layernorm"):
                if block != "rest":
                    one = torch.ones(shape["hidden"], dtype=torch.bfloat16)
                    base[f"model.{block}.{norm}.weight"] = one
                    tuned[f"model.{block}.{norm}.weight"] = one.clone()
        if blocks == ["rest"]:
            for key in ("model.embed_tokens.weight", "lm_head.weight"):
                base[key] = draw(shape["vocab"], shape["hidden"]).bfloat16().cpu()
                tuned[key] = base[key].clone()
            base["model.norm.weight"] = torch.ones(shape["hidden"], dtype=torch.bfloat16)
            tuned["model.norm.weight"] = base["model.norm.weight"].clone()
        file = f"model-{number:05d}-of-{len(shards) + 1:05d}.safetensors"
        for name, part in (("base", base), ("tuned", tuned)):
            save_file(part, str(folder / name / file), {"format": "pt"})
            maps[name] |= dict.fromkeys(part, file)
    for name, weight_map in maps.items():
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / name / "model.safetensors.index.json").write_text(json.dumps(index))


def naive(folder: Path, rank: int) -> None:
    """What a short script does: one dense SVD per matrix."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    factors = {}
    for shard in sorted((folder / "base").glob("*.safetensors")):
        with (
            safe_open(shard, "pt") as base,
            safe_open(folder / "tuned" / shard.name, "pt") as tuned,
        ):
            for name in base.keys():  # noqa: SIM118
                delta = tuned.get_tensor(name).float() - base.get_tensor(name).float()
                if delta.dim() == 2 and delta.any():
                    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
                    key = f"base_model.model.{name.removesuffix('.weight')}"
                    root = S[:rank].sqrt()
                    factors[f"{key}.lora_B.weight"] = (U[:, :rank] * root).contiguous()
                    factors[f"{key}.lora_A.weight"] = (root[:, None] * Vh[:rank]).contiguous()
    (folder / "naive").mkdir()
    save_file(factors, str(folder / "naive" / "adapter_model.safetensors"), {"format": "pt"})


def command(method: str, folder: Path, rank: int, peer: str | None) -> list[str]:
    base, tuned, out = (str(folder / n) for n in ("base", "tuned", method))
    if method == "loratool":
        return [sys.executable, "-m", "loratool", "extract", tuned, "--base", base, "--rank",
                str(rank), "-o", out, "-q"]  # fmt: skip
    if method == "naive":
        return [sys.executable, __file__, "--one", "naive", "--dir", str(folder), "--rank",
                str(rank)]  # fmt: skip
    return [str(peer), "-m", "mergekit.scripts.extract_lora", "--model", tuned, "--base-model",
            base, "--out-path", out, "--max-rank", str(rank)]  # fmt: skip


def run(method: str, folder: Path, rank: int, peer: str | None) -> float:
    """Seconds of a whole process; its output must be there, and good."""
    out = folder / method
    shutil.rmtree(out, ignore_errors=True)
    start = time.perf_counter()
    done = subprocess.run(
        command(method, folder, rank, peer), capture_output=True, text=True, check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
    )  # fmt: skip
    seconds = time.perf_counter() - start
    # mergekit fails offline in its very last step, the model card, after the weights are written
    if not (out / "adapter_model.safetensors").is_file():
        raise RuntimeError(f"{method}: {done.stderr[-3000:]}")
    return seconds


def error_of(folder: Path, method: str) -> float:
    """Relative error over all matrices of what a method wrote (on the CPU, in float32)."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file

    factors = load_file(str(folder / method / "adapter_model.safetensors"))
    lost = whole = 0.0
    for shard in sorted((folder / "base").glob("*.safetensors")):
        with (
            safe_open(shard, "pt") as base,
            safe_open(folder / "tuned" / shard.name, "pt") as tuned,
        ):
            for name in base.keys():  # noqa: SIM118
                key = f"base_model.model.{name.removesuffix('.weight')}"
                if f"{key}.lora_A.weight" in factors and "proj" in name:
                    delta = tuned.get_tensor(name).float() - base.get_tensor(name).float()
                    lora_A, lora_B = (factors[f"{key}.lora_{x}.weight"].float() for x in "AB")
                    whole += float(delta.square().sum(dtype=torch.float64))
                    delta -= lora_B @ lora_A
                    lost += float(delta.square().sum(dtype=torch.float64))
    return math.sqrt(lost / whole)


def on_cpu(args: argparse.Namespace, folder: Path) -> None:
    make_pair(folder, SHAPES[args.shape], args.layers, "cpu")
    names = ["loratool", "naive", *(["mergekit"] if args.peer_python else [])]
    names = [n for n in names if n not in args.skip]
    times: dict[str, list[float]] = {n: [] for n in names}
    for rep in range(args.reps):
        for name in names:
            times[name].append(run(name, folder, args.rank, args.peer_python))
        print(f"round {rep + 1}: " + ", ".join(f"{n} {times[n][-1]:.2f} s" for n in names),
              flush=True)  # fmt: skip
    print(f"{'':10} {'median s':>9} {'min':>7} {'max':>7}  {'rel. error':>11}  it / ours")
    for name in names:
        ratios = [a / b for a, b in zip(times[name], times["loratool"], strict=True)]
        print(
            f"{name:10} {statistics.median(times[name]):9.2f} {min(times[name]):7.2f} "
            f"{max(times[name]):7.2f}  {error_of(folder, name):11.8f}  "
            f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"
        )


def read_all(files: list[Path], threads: int) -> float:
    """Seconds to read files whole with ``threads`` threads, 16 MB at a time."""
    piece = 16 << 20
    tasks = [(f, at) for f in files for at in range(0, f.stat().st_size, piece)]
    handles = {f: os.open(f, os.O_RDONLY) for f in files}
    lock, place = threading.Lock(), iter(tasks)

    def work() -> None:
        buffer = memoryview(bytearray(piece))
        while True:
            with lock:
                task = next(place, None)
            if task is None:
                return
            os.preadv(handles[task[0]], [buffer], task[1])

    workers = [threading.Thread(target=work) for _ in range(threads)]
    start = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    seconds = time.perf_counter() - start
    for handle in handles.values():
        os.close(handle)
    return seconds


def forget(files: list[Path], cold: bool) -> None:
    """Drop the files from the page cache, so that the next read is the disk's."""
    for file in files if cold else ():
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def on_gpu(args: argparse.Namespace, folder: Path) -> None:
    import torch

    import loratool as lt

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    make_pair(folder, SHAPES[args.shape], args.layers, args.device)
    files = [f for n in ("base", "tuned") for f in sorted((folder / n).glob("*.safetensors"))]
    size = sum(f.stat().st_size for f in files)
    print(
        f"{args.shape}, {args.layers} layers: {size / 1e9:.1f} GB in both checkpoints", flush=True
    )
    torch.linalg.eigh(torch.eye(8, device=args.device))  # loads the solvers
    jobs: dict[str, list[float]] = {"read": [], "rank": [], "auto": []}
    for rep in range(args.reps):
        reads = {}
        for threads in (1, 2, 4, 8, 16) if not args.cold else (4, 16):
            forget(files, args.cold)
            reads[threads] = read_all(files, threads)
        jobs["read"].append(min(reads.values()))
        for name, rank in (("rank", args.rank), ("auto", "auto")):
            if name in args.skip:
                continue
            shutil.rmtree(folder / name, ignore_errors=True)
            forget(files, args.cold)
            start = time.perf_counter()
            report = lt.extract(
                folder / "tuned", base=folder / "base", output=folder / name, rank=rank,
                device=args.device, threads=args.threads,
            )  # fmt: skip
            jobs[name].append(time.perf_counter() - start)
        print(
            f"round {rep + 1}: read {reads}, "
            + ", ".join(f"{n} {jobs[n][-1]:.2f} s" for n in jobs if jobs[n])
            + f", error {report.relative_error:.4f}", flush=True,
        )  # fmt: skip
    for name in (n for n in ("rank", "auto") if jobs[n]):
        ratios = [a / b for a, b in zip(jobs[name], jobs["read"], strict=True)]
        print(
            f"{name}: median {statistics.median(jobs[name]):.2f} s, ours / best read "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}); "
            f"GPU peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--shape", choices=SHAPES, default="1.7b")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--dir", type=Path)
    parser.add_argument("--peer-python")
    parser.add_argument("--cold", action="store_true", help="read from the disk, not its cache")
    parser.add_argument("--skip", action="append", default=[])
    parser.add_argument("--one")
    args = parser.parse_args()
    if args.one:
        naive(args.dir, args.rank)
        return
    with tempfile.TemporaryDirectory(dir=args.dir) as temporary:
        (on_cpu if args.device == "cpu" else on_gpu)(args, Path(temporary))


if __name__ == "__main__":
    main()
