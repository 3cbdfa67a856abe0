"""The merge kernel over matrices in memory, nothing read or written.

Arguments: thread|process COUNT WIDTH ROUNDING.

Steps as `merge` plans them run through the engine's own executor; only their bytes come from
memory, and what they make is dropped.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from loratool.adapter import DeltaSpec, TensorData
from loratool.engine.executors import Task, find_executor
from loratool.engine.run import RunOptions
from loratool.engine.step import Nowhere, Result
from loratool.plan import DeltaPart, Step, TensorSpec
from loratool.store.reader import FileReader

RANK, MATRICES, SECONDS = 16, 4, 2.0


class Desk:
    """Takes the results, and drops them."""

    def done(self, task: Task, result: Result) -> None:
        """Nothing."""

    def advance(self, nbytes: int) -> None:
        """Nothing."""

    def release(self) -> None:
        """Nothing."""


def held(tensor: torch.Tensor, dtype: str) -> TensorData:
    data = memoryview(tensor.view(torch.uint8).numpy().reshape(-1))
    return TensorData("x", dtype, tuple(tensor.shape), data)


def make_step(number: int, width: int, how: dict[str, Any]) -> Step:
    generator = torch.Generator().manual_seed(number)
    weight = (torch.randn(width, width, generator=generator) * 0.02).bfloat16()
    fields = {
        "lora_A": held(torch.randn(RANK, width, generator=generator) * 0.02, "F32"),
        "lora_B": held(torch.randn(width, RANK, generator=generator) * 0.01, "F32"),
    }
    spec = DeltaSpec("lowrank", f"m{number}", "weight", fields, "linear", RANK, 2 * RANK, 2.0)
    output = TensorSpec(f"m{number}.weight", "BF16", (width, width))
    part = DeltaPart(spec, 1.0)
    return Step("add_deltas", output, (held(weight, "BF16"),), (width, width), (part,), args=how)


def make_loop(threads: int, width: int, rounding: str) -> Callable[[float], tuple[int, float]]:
    """(bytes, seconds) of whole matrices, one after the other until the time is up."""
    steps = [make_step(n, width, {"rounding": rounding}) for n in range(MATRICES)]
    env = RunOptions(threads=threads).env(FileReader())
    execute = find_executor("threads")

    def over(seconds: float) -> tuple[int, float]:
        done, start = 0, time.perf_counter()

        def tasks() -> Iterator[Task]:
            nonlocal done
            while time.perf_counter() - start < seconds:
                step = steps[done % MATRICES]
                done += 1
                yield Task(done, step, Nowhere())  # type: ignore[arg-type]

        execute(env, tasks(), Desk(), threads)
        return done * 2 * width * width, time.perf_counter() - start

    over(SECONDS / 4)  # buffers, code paths
    return over


def of_process(start: Any, rates: Any, width: int, rounding: str) -> None:
    """One of several: bytes per second, from the moment on that all are ready."""
    over = make_loop(1, width, rounding)
    start.wait()
    nbytes, seconds = over(SECONDS)
    rates.put(nbytes / seconds)


def prepare(arguments: list[str]) -> Callable[[], dict[str, float]]:
    word, count, width, rounding = arguments[0], *map(int, arguments[1:3]), arguments[3]
    if word == "thread":
        over = make_loop(count, width, rounding)
    else:
        spawn = multiprocessing.get_context("spawn")
        start, rates = spawn.Barrier(count + 1), spawn.Queue()
        for _ in range(count):
            spawn.Process(target=of_process, args=(start, rates, width, rounding)).start()

    def work() -> dict[str, float]:
        if word == "thread":
            nbytes, seconds = over(SECONDS)
            rate = nbytes / seconds / 1e9
        else:
            start.wait()
            rate = sum(rates.get() for _ in range(count)) / 1e9
        return {"job": 1 / rate, "GB/s": rate, "GB/s per core": rate / count}

    return work
