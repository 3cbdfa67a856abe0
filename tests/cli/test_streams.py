"""Closed, full and broken streams: the exit code of the contract, and every finished output kept.

A success whose report cannot be printed is 6 on a full disk and 141 at a broken pipe; a closed
stdout takes everything.  Errors keep their code, and nothing that happens to stderr matters.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import loratool as lt
from tests.faults.process import environment
from tests.faults.scene import fingerprint
from tests.make import with_whole

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/dev/full")

FORK_RUN = Path(__file__).with_name("fork_run.py")
STATES = ("ok", "closed", "full", "broken")
PAIRS = [(out, err) for out in STATES for err in STATES]
FEW = [(out, err) for out, err in PAIRS if err in ("ok", out)]
LOST = {"ok": 0, "closed": 0, "full": 6, "broken": 141}
"""State of stdout -> exit code of a success."""

COMMANDS: dict[str, str] = {
    "help": "--help",
    "version": "--version",
    "completion": "completion bash",
    "inspect": "inspect style",
    "spectrum": "inspect style --spectrum --base base --risk",
    "merge": "merge style sql --base base -o OUT",
    "dry-run": "merge style sql --base base -o OUT --dry-run",
    "combine": "merge style sql -o OUT",
    "subtract": "subtract style sql -o OUT",
    "subtract-from": "subtract style --from merged -o OUT",
    "swap": "swap style sql --in merged -o OUT",
    "split": "split whole --base base -o OUT",
    "rescale": "rescale style 0.3 -o OUT",
    "compress": "compress style --rank 2 -o OUT",
    "extract": "extract tuned --base base --rank 4 -o OUT",
    "compare": "compare style sql",
    "verify": "verify merged --base base --adapter style",
    "run": "run recipe.yaml --dry-run",
    "demo": "demo -o OUT",
}
ERRORS: dict[str, tuple[int, str]] = {
    "usage": (2, "merge style"),
    "no command": (2, "nonsense"),
    "missing": (3, "inspect nowhere"),
    "mismatch": (4, "merge base --base base -o OUT"),
    "exists": (5, "rescale style 0.5 -o merged"),
    "no folder": (6, "rescale style 0.5 -o nowhere/OUT"),
    "memory": (6, "merge style --base base -o OUT --max-memory 1MB"),
    "cache": (7, "pull me/style --offline -o OUT"),
    "differs": (10, "verify merged --base base --adapter sql"),
}
RECIPE = "steps:\n- rescale: {adapters: [style], factor: 0.5, output: half}\n"


def write_world(folder: Path) -> Path:
    lt.demo(folder)
    lt.merge([str(folder / "style")], base=folder / "base", output=folder / "merged")
    with_whole(folder / "style", folder / "whole", "model.norm.weight", folder / "base")
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def run_all(
    folder: Path, names: Sequence[str], pairs: Sequence[tuple[str, str]]
) -> list[dict[str, Any]]:
    """Each command line with pairs of streams, as text or as JSON."""
    world, cases = write_world(folder / "world"), []
    for name in names:
        has_json = name not in ("help", "version", "completion", "demo")
        for out, err in pairs if name != "demo" else zip(STATES, STATES, strict=True):
            odd = (STATES.index(out) + STATES.index(err)) % 2 == 1
            cases.append({"name": name, "stdout": out, "stderr": err, "json": odd and has_json})
    for number, case in enumerate(cases):
        line = COMMANDS.get(case["name"]) or ERRORS[case["name"]][1]
        case["words"] = line.replace("OUT", f"out{number}").split() + ["--json"] * case["json"]
    (folder / "cases.json").write_text(json.dumps(cases))
    words = [sys.executable, FORK_RUN, folder / "cases.json", folder / "results.json"]
    subprocess.run(words, cwd=world, env=environment(), check=True, timeout=600)
    results = json.loads((folder / "results.json").read_text())
    for number, (case, found) in enumerate(zip(cases, results, strict=True)):
        case |= found | {"files": fingerprint(world / f"out{number}")}
    return cases


@pytest.mark.parametrize("pairs", [FEW, pytest.param(PAIRS, marks=pytest.mark.slow)],
                         ids=["few", "all"])  # fmt: skip
def test_commands(tmp_path: Path, pairs: list[tuple[str, str]]) -> None:
    for case in run_all(tmp_path, list(COMMANDS), pairs):
        out, err = case["stdout"], case["stderr"]
        if (out, err) == ("ok", "ok"):
            whole = case
            assert case["out"], case
        assert case["code"] == LOST[out], case
        assert case["files"] == whole["files"], case
        assert "Traceback" not in case["err"] and "ignored" not in case["err"], case
        assert ("LT-609" in case["err"]) == (out == "full" and err == "ok"), case
        if out == "ok":
            assert json.loads(case["out"])["ok"] if case["json"] else case["out"], case


@pytest.mark.parametrize("pairs", [FEW, pytest.param(PAIRS, marks=pytest.mark.slow)],
                         ids=["few", "all"])  # fmt: skip
def test_errors_keep_their_code(tmp_path: Path, pairs: list[tuple[str, str]]) -> None:
    for case in run_all(tmp_path, list(ERRORS), pairs):
        code = ERRORS[case["name"]][0]
        assert case["code"] == code and case["files"] is None, case
        assert "Traceback" not in case["err"] + case["out"], case
        if case["json"] and case["stdout"] == "ok":
            assert json.loads(case["out"])["ok"] is False, case
        if not case["json"] and case["stderr"] == "ok" and code != 10:
            assert case["err"], case


# ------------------------------------------------------ from the first line of a real process

SHELL = {"closed": "{0}>&-", "full": "{0}>/dev/full", "broken": "{0}>&7", "ok": ""}
"""How a shell is told; descriptor 7 is a pipe that nobody reads."""


def in_shell(line: str, out: str, err: str, *, more: str = "") -> subprocess.CompletedProcess[str]:
    reader, writer = os.pipe()
    os.close(reader)
    python = f"{shlex.quote(sys.executable)} {more} -m loratool"
    given = " ".join(SHELL[s].format(n) for n, s in ((1, out), (2, err)))
    try:
        return subprocess.run(
            ["bash", "-c", f"exec 7>&{writer} {writer}>&-; exec {python} {line} {given}"],
            env=environment(), capture_output=True, text=True, timeout=60, pass_fds=[writer],
        )  # fmt: skip
    finally:
        os.close(writer)


@pytest.mark.parametrize(
    ("out", "err"), [pytest.param(*p, marks=[] if p in FEW else pytest.mark.slow) for p in PAIRS]
)
def test_as_a_process(out: str, err: str, data: Path) -> None:
    adapter = shlex.quote(str(data / "llm" / "lora_linear"))
    lines = ((f"inspect {adapter}", 0), (f"inspect {adapter} --json", 0), ("inspect /no", 3),
             ("inspect /no --json", 3))  # fmt: skip
    for line, code in lines:
        done = in_shell(line, out, err)
        assert done.returncode == (code or LOST[out]), done
        assert "Traceback" not in done.stderr and "ignored" not in done.stderr, done


@pytest.mark.parametrize("out", STATES)
def test_unbuffered(out: str, data: Path) -> None:
    done = in_shell(
        f"inspect {shlex.quote(str(data / 'llm' / 'lora_linear'))}", out, "ok", more="-u"
    )
    assert done.returncode == LOST[out] and "Traceback" not in done.stderr
    assert bool(done.stdout) == (out == "ok")


def test_all_three_closed_from_the_start(tmp_path: Path) -> None:
    """No file of the run gets a standard descriptor: no text ends up in an output."""
    write_world(tmp_path / "w")
    line = "merge style --base base -o {} --save-undo {}.undo.safetensors"
    for name, given in (("open", ""), ("closed", "<&- >&- 2>&-")):
        words = f"{shlex.quote(sys.executable)} -m loratool {line.format(name, name)} {given}"
        done = subprocess.run(["bash", "-c", words], cwd=tmp_path / "w", env=environment())
        assert done.returncode == 0
    world = tmp_path / "w"
    assert fingerprint(world / "closed") == fingerprint(world / "open")
    undo = [fingerprint(world / f"{name}.undo.safetensors") for name in ("open", "closed")]
    assert undo[0] == undo[1] is not None


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    words = f"ulimit -f 0; exec {shlex.quote(sys.executable)} -m loratool --help > {tmp_path}/text"
    done = subprocess.run(["bash", "-c", words], env=environment(), capture_output=True, text=True)
    assert done.returncode == 6 and "LT-609" in done.stderr


def test_a_slow_reader_that_does_not_block() -> None:
    """A pipe in non-blocking mode: every byte arrives."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    words = [sys.executable, "-m", "loratool", "merge", "--help"]
    with subprocess.Popen(words, stdout=writer, env=environment()) as child:
        os.close(writer)
        with os.fdopen(reader, "rb") as file:
            found = b""
            while part := file.read(512):
                found += part
        assert child.wait(60) == 0
    whole = subprocess.run(words, env=environment(), capture_output=True, check=True)
    assert found == whole.stdout and len(found) > 4096
