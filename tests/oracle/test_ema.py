"""``--ema``: the running average of a run's checkpoints, by its recursion in float64."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import loratool as lt
from loratool.errors import UsageError
from loratool.ops.averages import gamma_of
from tests.make import randn, random_factors, save_adapter, save_checkpoint

SHAPES = {"layers.0.q": (12, 10), "layers.0.up": (20, 12)}
COUNT, RANK = 5, 3
EPS = 2.0**-24
Tensors = dict[str, torch.Tensor]


def running(values: list[torch.Tensor], betas: list[float]) -> torch.Tensor:
    """avg ← β·avg + (1 - β)·next, from the first on."""
    found = values[0]
    for value, beta in zip(values[1:], betas, strict=True):
        found = beta * found + (1 - beta) * value
    return found


def power(sigma: float) -> list[float]:
    """β of the second checkpoint and those after it, γ a root of the paper's cubic equation."""
    t = sigma**-2
    gamma = max(z.real for z in np.roots([1, 7, 16 - t, 12 - t]) if abs(z.imag) < 1e-9)
    return [(1 - 1 / k) ** (gamma + 1) for k in range(2, COUNT + 1)]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Checkpoints of one run, and what it trains."""
    save_checkpoint(
        tmp_path / "base",
        {f"{n}.weight": randn(*s, seed=i) for i, (n, s) in enumerate(SHAPES.items())},
    )
    for k in range(COUNT):
        save_adapter(tmp_path / f"run-{k}", random_factors(SHAPES, rank=RANK, seed=70 * k))
    monkeypatch.chdir(tmp_path)
    return [f"run-{k}" for k in range(COUNT)]


def factors(folder: str) -> Tensors:
    return {k: v.double() for k, v in load_file(f"{folder}/adapter_model.safetensors").items()}


def deltas(folder: str) -> Tensors:
    with lt.open(folder) as adapter:
        return {m.name: m.delta() for m in adapter}


CASES = [(0.8, [0.8] * (COUNT - 1)), ("sigma=0.1", power(0.1)), ("sigma=0.28", power(0.28))]


@pytest.mark.parametrize(("ema", "betas"), CASES)
def test_average_of_a_run(ema: float | str, betas: list[float], run: list[str]) -> None:
    """Of ΔW (exact, and into a base, which verify repeats), and of lora_A and lora_B apart.

    Sums of COUNT terms of float32 factors: COUNT + 2 roundings of the largest element.
    """
    lt.merge(run, ema=ema, output="mean")
    want = {n: running([deltas(r)[n] for r in run], betas) for n in deltas(run[0])}
    for name, value in deltas("mean").items():
        assert float((value - want[name]).abs().max()) <= (COUNT + 2) * EPS * float(
            max(deltas(r)[name].abs().max() for r in run)
        )

    lt.merge(run, ema=ema, output="apart", method="factors-sum")
    every, scaling = [factors(r) for r in run], dict[str, float]()
    with lt.open(run[0]) as adapter:
        scaling = {m.name: m.scaling for m in adapter}
    for name, value in deltas("apart").items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        B, A = (running([f[f"{key}.lora_{side}.weight"] for f in every], betas) for side in "BA")
        exact = scaling[name] * B @ A
        bound = 4 * EPS * math.sqrt(RANK) * float(B.norm() * A.norm()) * scaling[name]
        assert float((value - exact).norm()) <= bound, name
    assert lt.inspect("apart").adapter.ranks == {RANK: len(SHAPES)}

    lt.merge(run, ema=ema, output="merged", base="base")
    merged = load_file("merged/model.safetensors")
    for name, value in load_file("base/model.safetensors").items():
        error = (merged[name].double() - value.double() - want[name]).abs().max()
        assert float(error) <= 2 * EPS * float(merged[name].abs().max())
    assert lt.verify("merged").verdict == "identical"
    assert lt.verify("merged", base="base", adapters=run, ema=ema).verdict == "identical"
    assert lt.verify("merged", base="base", adapters=run, ema=0.5).verdict == "differs"


def test_widths_of_the_power_function() -> None:
    """The profile t^γ on [0, 1] has mean (γ+1)/(γ+2) and variance σ²."""
    for sigma in (0.01, 0.05, 0.1, 0.25, 0.288):
        gamma = gamma_of(sigma)
        mean, square = (gamma + 1) / (gamma + 2), (gamma + 1) / (gamma + 3)
        assert math.isclose(square - mean**2, sigma**2, rel_tol=1e-9)


def test_the_order_of_a_shell_is_refused(run: list[str]) -> None:
    """Its ``*`` puts run-10 before run-9; the last checkpoint of a run has no number."""
    for old, new in zip(run, ("run-8", "run-9", "run-10", "run", "base-7"), strict=True):
        Path(old).rename(new)
    right = ["base-7", "run-8", "run-9", "run-10", "run"]
    lt.merge(right, ema=0.8, output="m")
    with pytest.raises(UsageError) as caught:
        lt.merge(sorted(right), ema=0.8, output="x")
    assert caught.value.code == "LT-262" and "run-10 before run-8" in caught.value.message()


def test_weights_multiply_it_and_nothing_else_sets_them(run: list[str]) -> None:
    lt.merge([f"{r}:-2" for r in run], ema=0.8, output="twice")
    lt.merge(run, ema=0.8, output="once")
    twice, once = deltas("twice"), deltas("once")
    assert all(torch.equal(value, -2 * once[name]) for name, value in twice.items())
    for more, code in [({"mean": True}, "LT-224"), ({"weights": [1.0] * COUNT}, "LT-224")]:
        with pytest.raises(UsageError) as caught:
            lt.merge(run, ema=0.8, output="x", **more)
        assert caught.value.code == code
    for wrong in (0.0, 1.0, -0.5, "nan", "sigma=0.289", "sigma=0", "half", "x sigma=0.1"):
        with pytest.raises(UsageError) as caught:
            lt.merge(run, ema=wrong, output="x")
        assert caught.value.code == "LT-262", wrong
