"""Reports as JSON."""

import json
import math
from pathlib import Path
from typing import ClassVar

import pytest

from loratool.report.base import Loads, Report
from loratool.report.extract import ExtractedModule, ExtractReport, group_families
from loratool.report.merge import VerifyReport


class _Example(Report):
    command: ClassVar[str] = "example"
    value: object


def test_envelope_comes_first():
    found = _Example(1).to_json()
    assert list(found)[:3] == ["schema", "command", "ok"]
    assert found == {"schema": 1, "command": "example", "ok": True, "value": 1}


def test_plain_types_only():
    odd = {8: (Path("a") / "b", math.nan, math.inf, 0.5), "loads": Loads("vLLM", "no", ("DoRA",))}
    found = _Example(odd).to_json()["value"]
    assert found == {
        "8": [str(Path("a") / "b"), None, None, 0.5],
        "loads": {
            "program": "vLLM",
            "verdict": "no",
            "reasons": ["DoRA"],
            "version": "",
            "source": [],
        },
    }
    json.dumps(found, allow_nan=False)


def _module(name, family, norm, error):
    return ExtractedModule(name, family, (4, 4), 2, norm, 1 - error**2, error)


def test_families_weigh_by_norm():
    families = group_families(
        [
            _module("0.q", "q", 3.0, 0.0),
            _module("1.q", "q", 4.0, 1.0),
            _module("0.k", "k", 0.0, 0.0),
        ]
    )
    assert [f.family for f in families] == ["q", "k"]
    assert families[0].modules == 2
    assert families[0].captured_energy == pytest.approx(9 / 25)
    assert families[0].relative_error == pytest.approx(4 / 5)
    assert families[1].captured_energy == 1.0


def test_extract_report_names_its_tuples():
    report = ExtractReport(
        output="o", tuned="t", base="b", rank=2, modules=(_module("0.q", "q", 1.0, 0.1),),
        kept=(("n.weight", 8),), left_out=(("e.weight", (9, 4), 144, 0.5),), identical=3,
        buffers=(), captured_energy=0.99, relative_error=0.1, total_relative_error=0.2,
        output_bytes=100, seconds=0.1,
    )  # fmt: skip
    found = report.to_json()
    assert found["kept"] == [{"name": "n.weight", "nbytes": 8}]
    assert found["left_out"][0] == {
        "name": "e.weight", "shape": [9, 4], "nbytes": 144, "relative_change": 0.5,
    }  # fmt: skip
    assert found["families"][0]["family"] == "q"


@pytest.mark.parametrize(
    ("verdict", "ok"), [("identical", True), ("rounding", True), ("differs", False)]
)
def test_verify_is_ok_unless_it_differs(verdict, ok):
    report = VerifyReport("m", "b", verdict, 1, 1, 0, (), (), (), 0.1)
    assert report.ok is ok and report.to_json()["ok"] is ok
