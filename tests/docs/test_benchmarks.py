"""Tables of measurements are those of the stored results, and every script says what it takes."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from benchmarks import harness, table

SCRIPTS = ("combine", "compress", "exact", "extract", "gpus", "kernel", "merge", "startup", "ties")


@pytest.mark.parametrize("page", table.PAGES, ids=lambda page: page.parent.name)
def test_a_page_has_the_stored_results(page: Path) -> None:
    assert table.PAGES[page](page.read_text(), table.stored()) == page.read_text(), (
        "python -m benchmarks.table"
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_is_listed(script: str) -> None:
    assert f"| `{script}` |" in (table.HERE / "README.md").read_text()
    assert callable(importlib.import_module(f"benchmarks.{script}").main)


def test_a_run_of_two_cases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both copies are measured, the one without its program is named, and nothing is left."""
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    (source / "file").write_bytes(bytes(1000))
    words = ["--reps", "2", "--json", str(tmp_path / "found.json")]
    asked = harness.parser("").parse_args(words)
    harness.compare("copying", "a copy", [
        harness.job("cp", "copy", source, out, output=out),
        harness.job("again", "copy", source, out, output=out),
        harness.job("peer", "copy", source, out, output=out, needs="no_such_package"),
    ], asked, {"bytes": 1000})  # fmt: skip
    found = json.loads((tmp_path / "found.json").read_text())
    assert {name: len(runs) for name, runs in found["runs"].items()} == {"cp": 2, "again": 2}
    assert found["skipped"] == ["peer (no_such_package is not installed)"] and not out.exists()
    assert all(0 < r["job"] < r["whole"] and r["cpu"] > 0 and r["peak_mb"] > 1
               for runs in found["runs"].values() for r in runs)  # fmt: skip
    assert table.render(found) in capsys.readouterr().out


def test_a_case_that_fails_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="cp: exit 1"):
        harness.measure(harness.job("cp", "copy", tmp_path / "missing", tmp_path / "out"))
