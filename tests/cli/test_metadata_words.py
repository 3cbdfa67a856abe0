"""`convert --set` and `--trigger` on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

import loratool as lt
from loratool.store.header import read_header
from tests.cli.conftest import Run
from tests.oracle.kohya_files import adapter_of

SAMPLE = adapter_of("kohya_sd15_locon")
SPOOF = "a\x1b[31m\n\u202eb"


@pytest.mark.parametrize("options, code", [
    ((), "LT-276"), (("--set", "title"), "LT-275"), (("--set", "=x"), "LT-275"),
    (("--set", "loratool=x"), "LT-275"), (("--set", "sshs_model_hash=00"), "LT-275"),
])  # fmt: skip
def test_what_cannot_be_meant_is_refused(
    run: Run, tmp_path: Path, options: tuple[str, ...], code: str
) -> None:
    result = run("convert", SAMPLE, *options, "-o", tmp_path / "o.safetensors", "--json")
    assert result.code == 2
    assert result.json["error"]["code"] == code
    assert not list(tmp_path.iterdir())


def test_what_is_set_is_said_escaped(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "o.safetensors"
    words = ("convert", SAMPLE, "--set", f"author={SPOOF}", "--trigger", "x y", "-o", out)
    dry = run(*words, "--dry-run")
    assert dry.code == 0 and not out.exists()
    assert "modelspec.author = a\\x1b[31m\\n\\u202eb" in dry.out
    assert "modelspec.trigger_phrase = x y" in dry.out
    assert run(*words).code == 0
    found = read_header(out).metadata
    assert (found["modelspec.author"], found["modelspec.trigger_phrase"]) == (SPOOF, "x y")


def test_many_keep_their_names(run: Run, tmp_path: Path) -> None:
    others = [SAMPLE, adapter_of("lycoris_locon")]
    for number, path in enumerate(others):
        (tmp_path / f"{number}.safetensors").write_bytes(path.read_bytes())
    run("convert", tmp_path / "0.safetensors", tmp_path / "1.safetensors", "--set", "tags=a,b",
        "-o", f"{tmp_path / 'out'}/")  # fmt: skip
    for number in range(2):
        one = lt.inspect(tmp_path / "out" / f"{number}.safetensors").adapter
        assert one is not None and one.metadata["modelspec.tags"] == "a,b"
