"""Recipes: end to end on real files, and every way in which they are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import loratool as lt
from tests.conftest import DATA

from .conftest import Run

GOOD = """\
# soften an adapter, merge it, check it, take it out again
steps:
  - rescale: {adapters: [style], factor: 0.5, output: softer}
  - merge:
      adapters: ["softer:0.8"]
      base: style/base
      output: merged
      save-undo: undo.safetensors
      no-provenance: true
  - verify: {merged: merged, base: style/base, adapter: ["softer:0.8"]}
  - subtract: {adapters: ["softer:0.8"], from: merged, undo: undo.safetensors, output: back}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(DATA / "llm" / "lora_linear", tmp_path / "style")
    return tmp_path


def recipe(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_steps_do_what_the_commands_do(folder: Path, run: Run) -> None:
    found = run("run", recipe(folder, GOOD))
    assert found.code == 0, found.err
    lines = found.out.splitlines()
    assert [text.split()[:2] for text in lines[1:5]] == [
        ["1", "rescale"], ["2", "merge"], ["3", "verify"], ["4", "subtract"]
    ]  # fmt: skip
    assert "identical" in lines[3]
    base = load_file(str(folder / "style" / "base" / "model.safetensors"))
    back = load_file(str(folder / "back" / "model.safetensors"))
    assert base.keys() == back.keys() and all(torch.equal(back[k], base[k]) for k in base)
    assert not (folder / "merged" / "loratool.json").read_text().count("adapters")
    assert Path.cwd() != folder


def test_the_api_returns_every_report(folder: Path) -> None:
    report = lt.run(recipe(folder, GOOD))
    assert [s.report.command for s in report.steps if s.report] == [
        "rescale", "merge", "verify", "subtract"
    ]  # fmt: skip
    assert [s.line for s in report.steps] == [3, 4, 10, 11]
    found = report.to_json()
    json.dumps(found, allow_nan=False)
    assert found["steps"][1]["report"]["output"] == "merged"


def test_dry_run_writes_nothing_and_says_what_waits(folder: Path, run: Run) -> None:
    before = sorted(folder.rglob("*"))
    path = recipe(folder, GOOD)
    found = run("run", path, "--dry-run", "--json")
    assert found.code == 0
    assert sorted(folder.rglob("*")) == sorted([*before, path])
    steps = found.json["steps"]
    assert [s["waits_for"] for s in steps] == [[], [1], [1, 2], [1, 2]]
    assert steps[0]["report"]["dry_run"] and steps[1]["report"] is None


def test_a_dry_run_draws_nothing(folder: Path, run: Run) -> None:
    """Its pictures and tables would be in the way of the run itself; their places are checked."""
    text = """\
steps:
  - inspect: {source: style, csv: s.csv, html: s.html}
  - compress: {adapters: [style], rank: 1, output: small, html: c.html}
"""
    path = recipe(folder, text)
    before = sorted(folder.rglob("*"))
    assert run("run", path, "--dry-run").code == 0 and sorted(folder.rglob("*")) == before
    assert run("run", path).code == 0
    assert {"s.csv", "s.html", "c.html", "small"} <= {p.name for p in folder.iterdir()}
    found = run("run", path, "--dry-run")
    assert found.code == 5 and "LT-508" in found.err and "step 1 of 2" in found.err


@pytest.mark.parametrize("other", ["a.html", "./a.html"])
def test_two_steps_write_to_one_place(folder: Path, run: Run, other: str) -> None:
    """Told before the first one runs, with the line of the second."""
    text = f"""\
steps:
  - inspect: {{source: style, html: a.html}}
  - inspect: {{source: style, html: {other}}}
"""
    path = recipe(folder, text)
    before = sorted(folder.rglob("*"))
    for how in ((), ("--dry-run",)):
        found = run("run", path, *how)
        assert found.code == 2 and "line 3" in found.err and "steps 1 and 2" in found.err
    assert sorted(folder.rglob("*")) == before


def test_it_stops_at_the_first_error_and_names_the_step(folder: Path, run: Run) -> None:
    (folder / "merged").mkdir()
    (folder / "merged" / "mine").write_text("keep")
    found = run("run", recipe(folder, GOOD))
    assert found.code == 5
    assert "error[LT-501]: step 2 of 4 (merge, line 4)" in found.err
    assert (folder / "softer").is_dir() and not (folder / "back").exists()
    assert (folder / "merged" / "mine").read_text() == "keep"


def test_a_verify_that_differs_stops_with_code_10(folder: Path, run: Run) -> None:
    text = """\
steps:
  - merge: {adapters: [style], base: style/base, output: m}
  - verify: {merged: m, base: style/base, adapter: ["style:0.5"]}
  - rescale: {adapters: [style], factor: 2, output: never}
"""
    found = run("run", recipe(folder, text))
    assert found.code == 10 and "step 2 of 3 (verify, line 3)" in found.err
    assert not (folder / "never").exists()


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("steps:\n- rescale: {adapters: [style], factor: 1, output: o, colour: red}", 2, "colour"),
        ("steps:\n- rescale:\n    factor: 1\n    output: o\n    factor: 2", 5, "twice.*line 3"),
        ("steps:\n- frobnicate: {output: o}", 2, "no command frobnicate"),
        ("steps:\n- compres: {output: o}", 2, "did you mean compress?"),
        ("steps:\n- compress: {adapters: [a], rnk: 4, output: o}", 2, "did you mean rank?"),
        ("steps:\n- compress: {adapters: [a], series: x, output: o}", 2, "no option series"),
        ("steps:\n- merge: {adapters: [a], skip: [te], exclude: [x], output: o}", 2, "second time"),
        ("steps:\n- demo: {output: o}", 2, "no command demo"),
        ("steps: []\nspeed: 3", 2, "unknown key speed"),
        ("steps: []", 1, "no steps"),
        ("steps: {merge: 1}", 1, "list of steps"),
        ("- merge", 1, "mapping"),
        ("steps:\n- merge", 2, "not one command"),
        ("steps:\n- merge: {}\n  verify: {}", 2, "not one command"),
        ("steps:\n- rescale: {factor: 2}", 2, "lacks adapters, output"),
        ("steps:\n- rescale: {adapters: style, factor: 2, output: o}", 2, "a list"),
        ("steps:\n- rescale: {adapters: [style], factor: '2', output: o}", 2, "a number"),
        ("steps:\n- rescale: {adapters: [style], factor: true, output: o}", 2, "a number"),
        ("steps:\n- rescale: {adapters: [style], factor: 2, output: 1}", 2, "quote it"),
        ("steps:\n- compress: {adapters: [style], rank: 010, output: o}", 2, "no decimal number"),
        ("steps:\n- compress: {adapters: [style], rank: 1:30, output: o}", 2, "no decimal number"),
        ("steps:\n- merge: {adapters: [s, t], weights: [1, 0x2], output: o}", 2, "no decimal"),
        ("steps:\n- rescale: {adapters: [style], factor: 2, output: o, force: 1}", 2, "true or"),
        ("steps:\n- merge: {adapters: [s], base: b, output: o, save-undo: u, save_undo: v}", 2,
         "second time"),
        ("steps:\n- merge: {adapters: [s], base: b, output: o, progress: x}", 2, "no option"),
        ("a: &x 1\nsteps: [*x]", 2, "aliases"),
        ("steps:\n - {", 2, "not YAML"),
        ("", None, "empty"),
        ("steps:\n- 1: {}", 2, "a key is a word"),
        ("steps:\n- inspect: {source: !!python/object:os.system x}", 2, "not a value"),
    ],
)  # fmt: skip
def test_refused_before_anything_runs(
    text: str, line: int | None, words: str, folder: Path, run: Run
) -> None:
    import re

    found = run("run", recipe(folder, text))
    assert found.code == 2, found.err
    assert re.search(words, found.err), found.err
    assert line is None or f"line {line}" in found.err
    assert sorted(p.name for p in folder.iterdir()) == ["recipe.yaml", "style"]


def test_no_such_recipe(tmp_path: Path, run: Run) -> None:
    assert run("run", tmp_path / "none.yaml").code == 3
    (tmp_path / "big.yaml").write_bytes(b"#" * 1_000_001)
    assert run("run", tmp_path / "big.yaml").code == 2
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe")
    assert run("run", tmp_path / "bytes.yaml").code == 2


def test_the_example_is_a_recipe(run: Run) -> None:
    path = Path(lt.__file__).parents[1] / "examples" / "recipe.yaml"
    found = run("run", path, "--dry-run", "--json")
    assert found.code == 0, found.out
    assert len(found.json["steps"]) == 4


@pytest.mark.parametrize("name", ["", ".", "/", ".."])
def test_a_first_output_without_a_name(name: str, folder: Path, run: Run) -> None:
    text = f"steps:\n  - rescale: {{adapters: [style], factor: 2, output: '{name}'}}\n"
    found = run("run", recipe(folder, text))
    assert found.code == 5 and "LT-510" in found.err


def test_a_method_has_its_parameters_in_a_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lt.demo(tmp_path / "toy")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(
        "steps:\n  - merge: {adapters: [toy/style, toy/sql], method: ties, rank: 4,\n"
        "            param: [density=0.5], output: out}\n"
    )
    lt.run("r.yaml")
    record = json.loads((tmp_path / "out" / "loratool.json").read_text())
    assert record["options"]["params"]["density"] == 0.5
