"""Whether a GPU pays: what rates say, and that they are those of the plan at hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import loratool as lt
from loratool.engine import choice
from loratool.engine.choice import Rates, decide, gpu_pays
from loratool.plan import Plan
from tests.make import randn, random_factors, save_adapter, save_checkpoint

GB = 10**9


@pytest.mark.parametrize(
    ("rates", "size", "wins", "words"),
    [
        (Rates(4e9), 2, False, "2 cores need 0.5 s, less than a GPU takes to start"),
        (Rates(4e9, 1e9), 16, False, "sum 4.0 GB/s, the disk takes 1.0 GB/s: a GPU would not help"),
        (Rates(0.5e9, 2e9, 9e9), 16, True, "sum 0.5 GB/s, the GPU 9.0 GB/s; the disk takes 2.0"),
        (Rates(0.5e9, None, 9e9), 16, True, "the GPU 9.0 GB/s"),
        (Rates(0.5e9, 0.4e9, 9e9), 16, False, "the disk takes 0.4 GB/s"),
        (Rates(1e9, 2e9, 1.1e9), 160, False, "the GPU 1.1 GB/s"),
        (Rates(1e9, 2e9, 2e9), 4, False, "the GPU 2.0 GB/s"),  # but it starts slowly
    ],
)
def test_what_rates_say(rates: Rates, size: int, wins: bool, words: str) -> None:
    found, reason = decide(rates, size * GB, 2)
    assert found == wins
    assert words in reason


def test_trials_of_a_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU in the place of the GPU: the rates are those of the plan's own kernel."""
    shape = {"model.layers.0.up_proj": (1700, 1000)}
    save_checkpoint(tmp_path / "base", {f"{k}.weight": randn(*s, seed=1) for k, s in shape.items()})
    save_adapter(tmp_path / "a", random_factors(shape, rank=4, seed=2))
    seen: list[tuple[Plan, Path | None, int]] = []

    def asked(*given: object) -> tuple[bool, str]:
        seen.append(given)  # type: ignore[arg-type]
        return gpu_pays(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(choice, "gpu_pays", asked)
    answers = iter([True])  # to the one question
    monkeypatch.setattr("torch.cuda.is_available", lambda: next(answers, False))
    report = lt.merge([tmp_path / "a"], base=tmp_path / "base", output=tmp_path / "out")
    assert report.device == "cpu"
    assert "less than a GPU takes to start" in report.device_reason
    assert len(seen) == 1

    monkeypatch.setattr(choice, "_START_S", 0.0)
    real = choice._trial
    monkeypatch.setattr(choice, "_trial", lambda step, _device: real(step, torch.device("cpu")))
    _, reason = gpu_pays(*seen[0])
    assert "GB/s" in reason
