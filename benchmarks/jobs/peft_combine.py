"""PEFT's `add_weighted_adapter` in memory: FOLDER WIDTH MODULES ADAPTERS METHOD.

As a script, without METHOD: makes the adapters.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.models import save_adapter

RANK = 16


class Net(torch.nn.Module):
    def __init__(self, width: int, modules: int) -> None:
        super().__init__()
        for i in range(modules):
            setattr(self, f"m{i}", torch.nn.Linear(width, width, bias=False))


def prepare(arguments: list[str]) -> Callable[[], None]:
    import peft

    folder, method = Path(arguments[0]), arguments[4]
    width, modules, count = map(int, arguments[1:4])
    names = [f"a{i}" for i in range(count)]
    model = peft.PeftModel.from_pretrained(Net(width, modules), folder / "a0", adapter_name="a0")
    for name in names[1:]:
        model.load_adapter(folder / name, adapter_name=name)
    extra = {"density": 0.2} if method.startswith("ties") else {}

    def work() -> None:
        model.add_weighted_adapter(
            names, [0.1] * count, "sum", combination_type=method, svd_rank=RANK,
            svd_full_matrices=False, **extra,
        )  # fmt: skip

    return work


def make(folder: Path, width: int, modules: int, count: int) -> None:
    shapes = {f"m{i}": (width, width) for i in range(modules)}
    for i in range(count):
        if not (folder / f"a{i}" / "adapter_config.json").exists():
            save_adapter(folder / f"a{i}", shapes, RANK, seed=i)


if __name__ == "__main__":
    make(Path(sys.argv[1]), *map(int, sys.argv[2:5]))
