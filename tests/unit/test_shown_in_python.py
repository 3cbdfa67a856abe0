"""What a notebook shows of an opened adapter and of reports."""

from __future__ import annotations

from pathlib import Path

import pytest

import loratool as lt
from tests.make import random_factors, save_adapter

SHAPES = {f"layers.{i}.{name}": (8, 6) for i in (0, 1) for name in ("q_proj", "v_proj")}


@pytest.fixture
def style(tmp_path: Path) -> Path:
    return save_adapter(tmp_path / "style", random_factors(SHAPES, rank=2, seed=1))


def test_an_adapter_says_what_it_is(style: Path) -> None:
    adapter = lt.open(style)
    assert repr(adapter) == "<style: LoRA, 4 modules>"
    assert adapter["layers.0.q_proj"] is adapter["layers.0.q_proj.weight"]
    with pytest.raises(KeyError, match=r"several end so: layers\.0\.q_proj\.weight, layers\.1"):
        adapter["q_proj"]
    with pytest.raises(KeyError, match=r"near: layers\.0\.q_proj\.weight"):
        adapter["layers.0.q_prj"]
    with pytest.raises(KeyError, match=r"no module 'zzz'[\"']?$"):
        adapter["zzz"]


def test_a_report_is_shown_in_a_few_lines(style: Path) -> None:
    report = lt.inspect(style, spectrum=True)
    assert repr(report).startswith(f"InspectReport(source='{style}'"[:70])
    assert "adapter=AdapterSummary(…)" in repr(report) and len(repr(report)) < 700
    assert len(report.to_json()["spectrum"]["modules"]) == 4
