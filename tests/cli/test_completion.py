"""``loratool completion --install``: it completes, and nothing of the user's is lost."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from .conftest import Run

OURS = "# >>> loratool completion >>>"
THEIRS = b"# mine \xff\nexport A=1"  # neither UTF-8 nor a last newline
STARTS = {"bash": ".bashrc", "zsh": ".zshrc"}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("XDG_DATA_HOME", "XDG_CONFIG_HOME", "ZDOTDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("sys.platform", "linux")
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_there_and_back(home: Path, run: Run, shell: str) -> None:
    before = {STARTS[shell]: THEIRS + b"\n"} if shell in STARTS else {}
    for name, data in before.items():
        (home / name).write_bytes(data)
    done = run("completion", shell, "--install", "--dry-run")
    assert done.code == 0 and "nothing was written" in done.out and contents(home) == before
    done = run("completion", shell, "--install")
    assert done.code == 0, done.err
    first = contents(home)
    assert all(str(home / name) in done.out for name in first)
    assert set(first) > set(before) and all(first[n].startswith(d) for n, d in before.items())
    again = run("completion", shell, "--install")
    assert contents(home) == first and "writes" not in again.out and "changes" not in again.out
    assert run("completion", shell, "--uninstall").code == 0
    assert contents(home) == before


def test_a_start_up_file_keeps_what_it_is(home: Path, run: Run) -> None:
    """A link stays one, a mode stays, and so does what another program writes below."""
    real = home / "dotfiles" / "bashrc"
    real.parent.mkdir()
    real.write_bytes(THEIRS)
    real.chmod(0o600)
    (home / ".bashrc").symlink_to(real)
    assert run("completion", "bash", "--install").code == 0
    assert (home / ".bashrc").is_symlink() and real.stat().st_mode & 0o777 == 0o600
    real.write_bytes(real.read_bytes() + b"export B=2\n")
    text = real.read_bytes()
    real.write_bytes(text.replace(b"completion.bash", b"completion.old"))
    assert run("completion", "bash", "--install").code == 0 and real.read_bytes() == text
    assert run("completion", "bash", "--uninstall").code == 0
    assert real.read_bytes() == THEIRS + b"\nexport B=2\n"


def test_a_broken_block_is_left_alone(home: Path, run: Run) -> None:
    (home / ".bashrc").write_text(f"a\n{OURS}\nb\n")
    done = run("completion", "bash", "--install")
    assert done.code == 5 and "LT-507" in done.err
    assert contents(home) == {".bashrc": f"a\n{OURS}\nb\n".encode()}


def test_the_login_shell(home: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHELL", "/usr/bin/fish")
    assert run("completion", "--install").code == 0
    assert list(contents(home)) == [".config/fish/completions/loratool.fish"]
    monkeypatch.setenv("SHELL", "/bin/tcsh")
    assert run("completion", "--install").code == 2
    monkeypatch.delenv("SHELL")
    assert run("completion").code == 2
    assert run("completion", "bash", "--install", "--uninstall").code == 2
    assert run("completion", "bash", "--dry-run").code == 2


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes(home: Path, run: Run) -> None:
    """As a shell does: the start-up file is read, and the function asked."""
    assert run("completion", "bash", "--install").code == 0
    bin_ = home / "bin"
    bin_.mkdir()
    loratool = bin_ / "loratool"
    loratool.write_text("#!/bin/sh\necho plain,inspect\necho plain,info\n")
    loratool.chmod(0o755)
    ask = (". ~/.bashrc; complete -p loratool; COMP_WORDS=(loratool in) COMP_CWORD=1; "
           "_loratool_completion loratool; echo ${COMPREPLY[@]}")  # fmt: skip
    env = {**os.environ, "PATH": f"{bin_}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "--norc", "-c", ask], env=env, capture_output=True, text=True,
                          timeout=60)  # fmt: skip
    assert done.stdout.splitlines()[-1] == "inspect info", done
    assert "_loratool_completion" in done.stdout


@pytest.mark.parametrize(
    ("line", "offers"),
    [
        ("loratool inspect st", ["file,st"]),
        ("loratool merge a b -o ou", ["file,ou"]),
        ("loratool merge a --base mo", ["file,mo"]),
        ("loratool verify m --adapter st", ["file,st"]),
        ("loratool check a --for com", ["plain,comfyui"]),
        ("loratool convert a --to koh", ["plain,kohya"]),
        ("loratool merge a --method slerp --dty", ["plain,--dtype"]),
        ("loratool compress a --max-rank 1", []),
    ],
)
def test_what_tab_offers(
    line: str, offers: list[str], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_LORATOOL_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(line.count(" ")))
    assert run().out.split() == offers


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes_paths(tmp_path: Path, run: Run) -> None:
    """The script tells bash to go on with names of files."""
    (tmp_path / "script").write_text(run("completion", "bash").out)
    text = """\
source ./script
loratool() { :; }
compopt() { echo "compopt $*"; }
env() { echo file,st; }
COMP_WORDS=(loratool inspect st) COMP_CWORD=2
_loratool_completion loratool
"""
    done = subprocess.run(["bash", "-c", text], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == ["compopt", "-o", "default"], done.stderr
