"""``inspect --spectrum`` against dense SVD, and its files."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import torch

import loratool as lt
from loratool.cli.spectrum import sparkline
from loratool.errors import LoratoolError
from loratool.report.spectrum import describe
from tests.oracle.test_compress import LLM, SAMPLES, dense, matrices, write


@pytest.mark.parametrize("name", SAMPLES)
def test_numbers_equal_dense_svd(name: str) -> None:
    found = lt.inspect(LLM / name, spectrum=True).spectrum
    assert found is not None
    deltas = dense(LLM / name)
    assert {m.name for m in found.modules} == set(deltas)
    for m in found.modules:
        D = matrices(deltas[m.name])
        sigma = torch.linalg.svdvals(D).square().sum(0).sqrt()[: len(m.sigma)]
        assert torch.tensor(m.sigma, dtype=torch.float64) == pytest.approx(
            sigma, rel=1e-9, abs=1e-12
        )
        assert m.norm == pytest.approx(float(D.norm()), rel=1e-9)
        assert m.stable_rank == pytest.approx(float(D.norm() / sigma[0]) ** 2, rel=1e-9)
        share = sigma.square().cumsum(0) / sigma.square().sum()
        assert share[m.rank_90 - 1] >= 0.9 - 1e-12
        assert m.rank_90 == 1 or share[m.rank_90 - 2] < 0.9
        assert m.rank_99 == 1 or share[m.rank_99 - 2] < 0.99
    families = {f.family: f for f in found.families}
    assert sum(f.modules for f in families.values()) == len(found.modules)
    total = math.sqrt(sum(float(d.norm()) ** 2 for d in deltas.values()))
    assert found.total.norm == pytest.approx(total, rel=1e-9)


def test_closed_forms() -> None:
    flat = describe("layers.3.q_proj.weight", 4, [2.0, 2.0, 2.0, 2.0])
    assert (flat.family, flat.layer) == ("q_proj", 3)
    assert flat.norm == pytest.approx(4.0, rel=1e-15)
    assert flat.stable_rank == pytest.approx(4.0, rel=1e-15)
    assert flat.entropy_rank == pytest.approx(4.0, rel=1e-14)
    assert (flat.rank_90, flat.rank_99) == (4, 4)
    steep = describe("a.weight", 3, [3.0, 1.0, 0.0])  # 9 of 10 is 90 % exactly
    assert (steep.rank_90, steep.rank_99) == (1, 2)
    tiny = describe("a.weight", 2, [1e-200, 1e-200])  # squares would be zero
    assert tiny.norm == pytest.approx(math.sqrt(2) * 1e-200, rel=1e-15)
    assert tiny.stable_rank == pytest.approx(2.0)
    assert describe("a.weight", 2, [0.0, 0.0]).is_dead
    assert not describe("a.weight", 2, [math.nan]).is_finite


def test_dead_and_broken_modules_are_named(tmp_path: Path) -> None:
    A = torch.randn(2, 8)
    broken = A.clone()
    broken[0, 0] = math.inf
    factors = {
        "fine": (torch.randn(8, 2), A),
        "dead": (torch.zeros(8, 2), A.clone()),
        "broken": (torch.randn(8, 2), broken),
    }
    report = lt.inspect(write(tmp_path / "in", factors), spectrum=True)
    assert report.spectrum is not None
    state = {m.family: (m.is_dead, m.is_finite) for m in report.spectrum.modules}
    assert state == {"fine": (False, True), "dead": (True, True), "broken": (False, False)}
    json.dumps(report.to_json(), allow_nan=False)


def test_csv_holds_every_value(tmp_path: Path) -> None:
    report = lt.inspect(LLM / "lora_rank_alpha_pattern", csv=tmp_path / "s.csv")
    assert report.spectrum is not None
    with (tmp_path / "s.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(report.spectrum.modules)
    for row, m in zip(rows, report.spectrum.modules, strict=True):
        assert row["module"] == m.name
        assert float(row["norm"]) == m.norm
        assert [float(row[f"s{i}"]) for i in range(1, len(m.sigma) + 1)] == list(m.sigma)
    with pytest.raises(LoratoolError, match="exists"):
        lt.inspect(LLM / "lora_linear", csv=tmp_path / "s.csv")


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_plot_is_a_picture_and_the_same_each_time(suffix: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("a", "b"):
        lt.inspect(LLM / "lora_linear", plot=tmp_path / f"{name}{suffix}")
    first, second = ((tmp_path / f"{n}{suffix}").read_bytes() for n in ("a", "b"))
    assert first == second
    assert first.startswith(b"\x89PNG" if suffix == ".png" else b"<?xml")
    with pytest.raises(LoratoolError, match="cannot draw"):
        lt.inspect(LLM / "lora_linear", plot=tmp_path / "a.jpg")


def test_deltas_without_a_spectrum_are_listed() -> None:
    for name, kind in (
        ("lora_dora", "dora"),
        ("lora_pissa", "lowrank"),
        ("lora_lora_bias", "vector"),
    ):
        found = lt.inspect(LLM / name, spectrum=True).spectrum
        assert found is not None
        with lt.open(LLM / name) as adapter:
            expected = [m.name for m in adapter if m.spec.kind == kind]
        assert list(found.left_out) == expected


def test_only_adapters_have_one() -> None:
    with pytest.raises(LoratoolError, match="one adapter"):
        lt.inspect(LLM / "lora_linear" / "base", spectrum=True)


def test_sparkline() -> None:
    assert sparkline([1.0, 0.5, 0.0]) == "█▅▁"
    assert sparkline([0.0, 0.0]) == "▁▁"
    assert len(sparkline([1.0] * 100)) == 16
