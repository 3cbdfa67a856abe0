"""Merging adapters with each other, beside PEFT; and TIES into an 8B-shaped base on CUDA.

python benchmarks/combine.py              # 10 adapters r = 16 against add_weighted_adapter
python benchmarks/combine.py --cuda       # TIES of 8 adapters, CUDA against the CPU
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import loratool as lt
from tests.make import random_factors, save_adapter, save_checkpoint

RANK = 16


class Net(torch.nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.q_proj = torch.nn.Linear(size, size, bias=False)


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def beside_peft(folder: Path, size: int, count: int, repeats: int) -> None:
    """Times of the arithmetic and of the whole command; PEFT's has no reading and writing."""
    import peft

    shapes = {"q_proj": (size, size)}
    paths = [
        save_adapter(folder / f"a{i}", random_factors(shapes, rank=RANK, seed=9 * i))
        for i in range(count)
    ]
    model = peft.PeftModel.from_pretrained(Net(size), str(paths[0]), adapter_name="a0")
    for i, path in enumerate(paths[1:], 1):
        model.load_adapter(str(path), adapter_name=f"a{i}")
    names, weights = [f"a{i}" for i in range(count)], [0.1] * count
    for ours, theirs, extra in (
        ("svd", "svd", {}),
        ("ties-peft", "ties_svd", {"density": 0.2}),
    ):
        mine, peers = [], []
        for turn in range(repeats):
            out = folder / f"{ours}{turn}"
            mine.append(
                timed(lambda o=out, m=ours, e=extra: lt.merge(  # type: ignore[misc]
                    [str(p) for p in paths], output=o, method=m, params=e, rank=RANK,
                    weights=weights, provenance=False,
                ))
            )  # fmt: skip
            peers.append(
                timed(lambda t=theirs, e=extra, n=turn: model.add_weighted_adapter(  # type: ignore[misc]
                    names, weights, f"{t}{n}", combination_type=t, svd_rank=RANK,
                    svd_full_matrices=False, **e,
                ))
            )  # fmt: skip
        best, peer = min(mine), min(peers)
        print(f"{ours}: loratool {best:.3f} s with files, PEFT {theirs} {peer:.2f} s in memory: "
              f"{peer / best:.0f}×")  # fmt: skip


def into_base(folder: Path, layers: int, count: int) -> None:
    """TIES straight into bfloat16 weights of Llama-3-8B's shapes; inputs in the page cache."""
    shapes: dict[str, tuple[int, int]] = {}
    for i in range(layers):
        at = f"model.layers.{i}"
        shapes |= {f"{at}.self_attn.{p}_proj": (4096, 4096) for p in "qo"}
        shapes |= {f"{at}.self_attn.{p}_proj": (1024, 4096) for p in "kv"}
        shapes |= {f"{at}.mlp.{p}_proj": (14336, 4096) for p in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj"] = (4096, 14336)
    weights = {f"{n}.weight": torch.randn(s).mul_(0.02).bfloat16() for n, s in shapes.items()}
    base = save_checkpoint(folder / "base", weights, shards=max(1, layers // 2))
    del weights
    adapters = [
        str(save_adapter(folder / f"b{i}", random_factors(shapes, rank=RANK, seed=1000 * i)))
        for i in range(count)
    ]
    for device in ("cpu", "cuda", "cpu", "cuda"):
        out = folder / f"out_{device}"
        seconds = timed(lambda d=device, o=out: lt.merge(  # type: ignore[misc]
            adapters, base=base, output=o, method="ties", device=d, force=True, threads=16,
        ))  # fmt: skip
        print(f"ties of {count} adapters, {layers} layers, {device}: {seconds:.2f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--dir", type=Path, default=None, help="where files go, such as /dev/shm")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as temporary:
        if args.cuda:
            into_base(Path(temporary), args.layers, 8)
        else:
            beside_peft(Path(temporary), args.size, 10, args.repeats)
