"""The commands on real (tiny) files: what a person types, reads and scripts against."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import loratool as lt

from .conftest import Run, write_safetensors

MERGE_KEYS = {
    "schema", "command", "ok", "output", "adapters", "base", "base_label", "changed", "copied",
    "cast", "created", "skipped", "rule", "device", "device_reason", "dtype", "shards",
    "output_bytes", "peak_memory_bytes", "seconds", "modules", "total", "warnings", "notes",
    "sidecars", "tokenizer", "dry_run", "plan", "undo", "undo_bytes",
    "least_time",
}  # fmt: skip


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with base, style, sql and tuned, entered."""
    lt.demo(tmp_path / "toy")
    monkeypatch.chdir(tmp_path / "toy")
    return tmp_path / "toy"


def test_merge_verify_extract(toy: Path, run: Run) -> None:
    done = run("merge", "style:0.8", "sql", "--base", "base", "-o", "merged")
    assert done.code == 0, done.err
    assert done.out.startswith("Merging 2 adapters INTO base weights: 0.8·style + 1·sql")
    assert not (toy / "merged" / "adapter_config.json").exists()

    check = next(x for x in done.out.splitlines() if x.startswith("check"))
    words = check.split()[2:]
    assert run(*words).code == 0  # the line can be pasted

    wrong = run("verify", "merged", "--base", "base", "--adapter", "style", "--adapter", "sql")
    assert wrong.code == 10 and "DIFFERS" in wrong.out

    done = run("extract", "tuned", "--base", "base", "--rank", "4", "-o", "lora")
    assert done.code == 0 and "energy" in done.out and "left out" in done.out
    assert run("inspect", "lora").code == 0


def test_undo_subtract_swap(toy: Path, run: Run) -> None:
    done = run("merge", "style:0.8", "--base", "base", "-o", "m", "--save-undo", "u.safetensors")
    assert done.code == 0 and "undo      u.safetensors" in done.out, done.err
    back = run("subtract", "style:0.8", "--from", "m", "--undo", "u.safetensors", "-o", "b")
    assert back.code == 0 and "OUT OF merged weights: 0.8·style" in back.out
    assert "14 tensors equal to the base in every bit" in back.out and "loss" not in back.out
    plain = run("subtract", "style", "--from", "m", "-o", "p", "--json").json
    assert plain["command"] == "subtract" and plain["restored"] == 0
    assert plain["warnings"] == ["style was merged at weight 0.8, not 1"]
    swapped = run("swap", "style:0.8", "sql:0.5", "--in", "m", "-o", "s", "--exact")
    assert swapped.code == 0 and "0.8·style out, 0.5·sql in" in swapped.out
    lacking = run("subtract", "style", "-o", "x")
    assert lacking.code == 2 and "--from MERGED" in lacking.err
    rest = run("subtract", "style", "sql", "-o", "x")
    assert rest.code == 0 and rest.out.startswith("Subtracting adapters, no base: style − 1·sql")


def test_json_of_every_command(toy: Path, run: Run) -> None:
    merged = run("merge", "style", "--base", "base", "-o", "merged", "--json").json
    assert set(merged) == MERGE_KEYS
    assert (merged["schema"], merged["command"], merged["ok"]) == (1, "merge", True)
    assert set(merged["modules"][0]) == {
        "name", "dtype", "rho", "loss", "predicted_loss", "changed_share", "predicted_share",
    }  # fmt: skip
    found = run("verify", "merged", "--base", "base", "--adapter", "style", "--json").json
    assert found["verdict"] == "identical" and found["ok"]
    found = run("extract", "tuned", "--base", "base", "--rank", "4", "-o", "lora", "--json").json
    assert found["command"] == "extract" and found["families"][0]["captured_energy"] <= 1
    found = run("inspect", "style", "--tensors", "--json").json
    assert found["adapter"]["dialect"] == "peft" and len(found["tensors"]) == 28
    found = run("inspect", "style", "sql", "base", "--json").json
    assert [row["name"] for row in found["rows"]] == ["style", "sql", "base"]


def test_dry_run_writes_nothing(toy: Path, run: Run) -> None:
    before = sorted(toy.iterdir())
    found = run("merge", "style", "--base", "base", "-o", "merged", "--dry-run")
    assert found.code == 0 and "model.layers.*." in found.out and "+ 1 delta" in found.out
    assert sorted(toy.iterdir()) == before
    plan = run("merge", "style", "--base", "base", "-o", "merged", "--dry-run", "--json").json
    assert len(plan["plan"]["steps"]) == plan["changed"] + plan["copied"]


def test_output_is_not_overwritten(toy: Path, run: Run) -> None:
    words = ("merge", "style", "--base", "base", "-o", "merged")
    assert run(*words).code == 0
    again = run(*words)
    assert again.code == 5 and "--force" in again.err
    assert run(*words, "--force", "-q").out == "merged\n"


def test_weights_option_and_mean(toy: Path, run: Run) -> None:
    a = run("merge", "style", "sql", "--weights", "0.5,-0.5", "--base", "base", "-o", "a")
    assert "0.5·style + -0.5·sql" in a.out
    b = run("merge", "style", "sql", "--mean", "--base", "base", "-o", "b")
    assert "(1·style + 1·sql) / 2" in b.out and b.code == 0


def test_one_adapter_without_base_names_what_it_was_trained_on(toy: Path, run: Run) -> None:
    config = toy / "style" / "adapter_config.json"
    settings = json.loads(config.read_text()) | {"base_model_name_or_path": "me/base"}
    config.write_text(json.dumps(settings))
    found = run("merge", "style", "-o", "merged")
    assert found.code == 2
    assert "an adapter of me/base" in found.err
    assert "loratool merge style --base auto -o merged" in found.err


def test_several_adapters_without_base(toy: Path, run: Run) -> None:
    found = run("merge", "style", "sql", "-o", "merged")
    assert found.code == 0 and found.out.startswith("Merging 2 adapters WITH EACH OTHER, no base")


def test_inspect_many_goes_on_after_a_failure(toy: Path, run: Run) -> None:
    found = run("inspect", "style", "gone.safetensors", "sql")
    assert found.code == 3
    assert "gone.safetensors: [LT-300]" in found.out and "sql" in found.out


def test_inspect_a_folder_of_nothing_that_can_be_read(run: Run, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"\0" * 9)
    found = run("inspect", tmp_path)
    assert found.code == 4 and found.out.count("error") == 2
    write_safetensors(tmp_path / "c.safetensors", {"x.weight": (2, 2)})
    assert run("inspect", tmp_path).code == 0


def test_inspect_folder(toy: Path, run: Run) -> None:
    (toy / "bad.safetensors").write_bytes(b"\xff" * 100)
    found = run("inspect", ".")
    assert found.code == 0
    for name in ("base", "sql", "style", "tuned"):
        assert f"\n{name} " in found.out
    assert "bad.safetensors: [LT-3" in found.out and "total" in found.out


EVIL = "q\x1b[31m\u202e[/bold][link=http://x]\x9b2J"


@pytest.mark.parametrize("options", [(), ("--tensors",), ("-v",), ("--json",), ("-q",)])
def test_hostile_names_in_a_file(tmp_path: Path, run: Run, options: tuple[str, ...]) -> None:
    folder = tmp_path / "evil"
    folder.mkdir()
    names = {
        f"base_model.model.{EVIL}.lora_{x}.weight": s for x, s in (("A", (2, 4)), ("B", (6, 2)))
    }
    write_safetensors(folder / "adapter_model.safetensors", names, {"format": "pt", EVIL: EVIL})
    config = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": EVIL,
        "task_type": EVIL, "target_modules": [EVIL],
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    found = run("inspect", folder, *options)
    assert found.code == 0, found.err
    assert all(c == "\n" or c.isprintable() for c in found.out + found.err)
    if "--json" in options:
        assert found.json["adapter"]["base_model"] == EVIL
    else:
        assert "q\\x1b[31m\\u202e[/bold][link=http://x]\\x9b2J" in found.out


def test_progress_goes_to_stderr_only(toy: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "loratool", "merge", "style", "--base", "base", "-o", "m", "--json"],
        capture_output=True, text=True, env={**os.environ, "TERM": "dumb"},
    )  # fmt: skip
    assert done.returncode == 0 and json.loads(done.stdout)["ok"]


def test_demo(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = run("demo")
    assert found.code == 0, found.err
    assert found.out.count("\n$ loratool ") == 6 and "identical, bit for bit" in found.out
    assert list(tmp_path.iterdir()) == []
    assert run("demo", "-o", "tour", "-q").code == 0
    assert (tmp_path / "tour" / "merged").is_dir()
    assert run("demo", "-o", "tour").code == 5
    assert run("demo", "--json").code == 2
    assert run("demo", "-o", "other", "--json").json["command"] == "demo"


def test_processes_end_in_order(toy: Path, run: Run) -> None:
    """Workers are over before the interpreter is: else torch aborts the process, now and then."""
    assert run("merge", "style", "--base", "base", "-o", "m").code == 0
    words = [sys.executable, "-m", "loratool", "verify", "m", "-q", "--threads", "8"]
    for _ in range(4):
        done = subprocess.run(words, capture_output=True, text=True, env={**os.environ})
        assert (done.returncode, done.stdout) == (0, "identical\n"), done.stderr
