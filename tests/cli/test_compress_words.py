"""What `compress` and `inspect --spectrum` say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loratool.cli import run

LLM = Path(__file__).parents[1] / "data" / "llm"


def test_json_has_families_and_modules(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert run(["compress", str(LLM / "lora_linear"), "--rank", "2", "-o", out, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (one,) = found["adapters"]
    assert found["command"] == "compress"
    assert {m["rank"] for m in one["modules"]} == {2}
    assert one["bytes_after"] < one["bytes_before"]
    assert one["families"]


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--rank", "0.9"], 2, "--energy"),
        (["--rank", "auto"], 2, "--energy 0.99"),
        ([], 2, "how far"),
        (["--sv-ratio", "0.5"], 2, "1 or more"),
        (["--energy", "1.5"], 2, "from 0 to 1"),
        (["--size", "1"], 2, "bytes or more"),
    ],
)
def test_wrong_criteria(
    words: list[str], code: int, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["compress", str(LLM / "lora_linear"), *words, "-o", str(tmp_path / "out")]
    assert run(args) == code
    assert text in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_dropped_and_unchanged_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = LLM / "lora_bias_all"
    size = str(int((source / "adapter_model.safetensors").stat().st_size * 0.7))
    assert run(["compress", str(source), "--size", size, "-o", str(tmp_path / "a")]) == 0
    assert "of rank 0" in capsys.readouterr().out
    assert run(["compress", str(source), "--rank", "64", "-o", str(tmp_path / "b")]) == 0
    assert "the output is the input" in capsys.readouterr().out


def test_outputs_are_not_overwritten(tmp_path: Path) -> None:
    args = ["compress", str(LLM / "lora_linear"), "--rank", "2", "-o", str(tmp_path / "out"), "-q"]
    assert run(args) == 0
    assert run(args) == 5
    assert run([*args, "--force"]) == 0


def test_spectrum_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(LLM / "lora_linear"), "--spectrum"]) == 0
    text = capsys.readouterr().out
    assert "q_proj" in text
    assert "█" in text
    assert "headers only" not in text
