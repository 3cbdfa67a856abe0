"""What a type checker is told of the library: which report a call returns."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import loratool

USE = """
from typing import assert_type
import loratool as lt
from loratool.report.combine import CombineReport, DifferenceReport
from loratool.report.merge import MergeReport, SubtractReport

assert_type(lt.merge(["a"], base="b", output="c"), MergeReport)
assert_type(lt.merge(["a"], base="b", into="base", output="c"), MergeReport)
assert_type(lt.merge(["a", "d"], output="c"), CombineReport)
assert_type(lt.merge(["a", "d"], base="b", into="adapter", output="c"), CombineReport)
assert_type(lt.subtract(["a"], merged="b", output="c"), SubtractReport)
assert_type(lt.subtract(["a", "d"], output="c"), DifferenceReport)

def either(base: str | None) -> None:
    assert_type(lt.merge(["a"], base=base, output="c"), MergeReport | CombineReport)

lt.merge(["a"], base="b", outpt="c")  # type: ignore[call-overload]
lt.merge(["a"], base="b", output="c", dtype="int8")  # type: ignore[call-overload]
"""


@pytest.mark.slow
def test_the_report_follows_from_the_call(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "use.py").write_text(USE)
    root = str(Path(loratool.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", tmp_path / "cache", "use.py"],
        cwd=tmp_path, env={**os.environ, "MYPYPATH": root, "PYTHONPATH": root},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
