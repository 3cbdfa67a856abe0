"""What merging adapters with each other says, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from loratool.delta.toy import write_toy

from .conftest import Run


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    write_toy(folder)
    return folder


def test_first_line_says_which_merge(run: Run, toy: Path, tmp_path: Path) -> None:
    one, two = f"{toy / 'style'}:0.5", str(toy / "sql")
    first = run("merge", one, two, "-o", str(tmp_path / "both")).out.splitlines()[0]
    assert first.startswith("Merging 2 adapters WITH EACH OTHER, no base: 0.5·style + 1·sql; cat")
    words = run("merge", one, two, "--base", str(toy / "base"), "-o", str(tmp_path / "m")).out
    assert words.splitlines()[0].startswith("Merging 2 adapters INTO base weights")


def test_json(run: Run, toy: Path, tmp_path: Path) -> None:
    out = run("merge", str(toy / "style"), str(toy / "sql"), "--method", "ties", "--param",
              "density=0.5", "-o", str(tmp_path / "one"), "--json")  # fmt: skip
    report = out.json
    assert (report["command"], report["method"]) == ("merge", "ties")
    assert report["params"] == {"density": 0.5, "lambda": 1.0}
    assert report["peak_memory_bytes"] > 0


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--param", "density=0.5"], "LT-256"),
        (["--method", "ties", "--param", "density=2"], "LT-257"),
        (["--method", "ties", "--param", "density"], "LT-258"),
        (["--shard-size", "1GB"], "LT-286"),
        (["--method", "slerp", "--weights", "1,-1"], "LT-259"),
        (["--base", "BASE", "--method", "core"], "LT-286"),
        (["--base", "BASE", "--rank", "4"], "LT-286"),
        (["--base", "BASE", "--method", "ties", "--exact"], "LT-286"),
    ],
)
def test_refusals(words: list[str], code: str, run: Run, toy: Path, tmp_path: Path) -> None:
    words = [str(toy / "base") if w == "BASE" else w for w in words]
    done = run("merge", str(toy / "style"), str(toy / "sql"), *words, "-o", str(tmp_path / "x"))
    assert done.code == 2 and code in done.err
    assert not (tmp_path / "x").exists()


def test_a_lone_adapter_gets_a_hint(run: Run, toy: Path, tmp_path: Path) -> None:
    done = run("merge", str(toy / "style"), "-o", str(tmp_path / "x"))
    assert done.code == 2 and "LT-205" in done.err and "--base" in done.err
