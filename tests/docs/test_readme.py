"""What README shows is what happens: its first commands and its Python block are run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import loratool as lt
from loratool.cli import run

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
OVERVIEW = (ROOT / "docs" / "overview.md").read_text()


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which README's names exist."""
    lt.demo(tmp_path / "demo")
    for name, called in (
        ("base", "model"),
        ("style", "style"),
        ("sql", "sql"),
        ("tuned", "my-sft"),
    ):
        (tmp_path / "demo" / name).rename(tmp_path / called)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_first_screen_runs(workplace: Path) -> None:
    block = README.split("```console\n")[1].split("```")[0]
    commands = [line[2:].partition("  #")[0] for line in block.splitlines() if line[:2] == "$ "]
    assert len(commands) == 6
    for command in commands:
        words = shlex.split(command.partition(" # ")[0])
        assert words[0] == "loratool"
        assert run(words[1:]) == 0, command
    assert (workplace / "merged").is_dir() and (workplace / "lora").is_dir()


def test_python_block_runs(workplace: Path) -> None:
    block = README.split("```python\n")[1].split("```")[0]
    exec(compile(block, "README.md", "exec"), {})
    assert (workplace / "merged" / "config.json").is_file()


def test_every_command_and_option_exists(capsys: pytest.CaptureFixture[str]) -> None:
    """Options that the overview names are options of the command it names them for."""
    for entry in re.split(r"\n- ", OVERVIEW)[1:]:
        name = entry.lstrip("`").split()[0].strip("`,")
        run([name, "--help"])
        help_text = capsys.readouterr().out
        for option in re.findall(r"--[a-z][a-z-]+", entry):
            assert option in help_text, (name, option)
