"""What `inspect FOLDER` shows and writes."""

from __future__ import annotations

import csv
import io
import re
import shutil
from pathlib import Path

import pytest

from loratool.cli import folder as folder_cli
from loratool.cli import render
from loratool.cli.render import cell_width
from tests.cli.conftest import Run
from tests.oracle.kohya_files import adapter_of
from tests.oracle.test_folder import lora

EVIL = "x\x1b[31m\u202e=cmd()"


@pytest.fixture
def loras(tmp_path: Path) -> Path:
    place = tmp_path / "loras"
    place.mkdir()
    lora(place / "a.safetensors", {
        "modelspec.title": EVIL, "modelspec.trigger_phrase": EVIL, "ss_network_module": "lycoris",
        "ss_network_args": '{"algo": "\\u001b[2J"}', "modelspec.author": "=1+1",
    })  # fmt: skip
    shutil.copy(place / "a.safetensors", place / "copy of a.safetensors")
    shutil.copy(adapter_of("lycoris_loha"), place / "loha.safetensors")
    (place / "bad.safetensors").write_bytes(b"x")
    return place


def test_table(run: Run, loras: Path) -> None:
    shown = run("inspect", loras, "--duplicates")
    assert shown.code == 0
    lines = shown.out.splitlines()
    assert lines[0].split() == ["name", "what", "modules", "rank", "scaling", "params", "size",
                                "type", "trainer", "trigger", "loads"]  # fmt: skip
    assert lines[-4].startswith("error") and "LT-301" in lines[-4]
    assert lines[-3] == "same      copy of a.safetensors = a.safetensors · bit for bit"
    assert lines[-2].endswith("1 duplicate")
    assert lines[-1].strip() == "kohya LoRA 2 · LyCORIS LoHa 1"
    assert "\x1b[31m" not in shown.out and "\u202e" not in shown.out and "\x1b[2J" not in shown.out


@pytest.mark.parametrize("columns", [60, 80, 120, 200])
def test_narrow_terminals_lose_columns_not_sense(
    run: Run, loras: Path, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setattr(folder_cli, "is_terminal", lambda: True)
    monkeypatch.setattr(render, "is_terminal", lambda *_: True)
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = run("inspect", loras).out.splitlines()
    assert max(map(cell_width, lines[:4])) <= columns
    assert re.match(r"name +(model +)?what .*rank .*size", lines[0])


def test_csv_is_the_folder(run: Run, loras: Path, tmp_path: Path) -> None:
    out = tmp_path / "all.csv"
    assert run("inspect", loras, "--csv", out, "--duplicates").code == 0
    rows = list(csv.DictReader(io.StringIO(out.read_text())))
    assert [r["name"] for r in rows] == sorted(p.name for p in loras.iterdir())
    by_name = {r["name"]: r for r in rows}
    assert by_name["copy of a.safetensors"]["same_as"] == "a.safetensors"
    assert by_name["a.safetensors"]["author"] == "'=1+1"
    assert by_name["a.safetensors"]["ranks"] == "4:4"
    assert by_name["a.safetensors"]["same_as"] == ""
    assert by_name["bad.safetensors"]["error"].startswith("LT-301")
    assert by_name["loha.safetensors"]["loads_ComfyUI"] in ("yes", "unsure")
    assert by_name["loha.safetensors"]["loads_diffusers"] == "no"


@pytest.mark.parametrize("option", ["--risk", "--spectrum", "--plot=x.png"])
def test_what_is_for_one_adapter_is_refused(run: Run, loras: Path, option: str) -> None:
    assert run("inspect", loras, option).code == 2
