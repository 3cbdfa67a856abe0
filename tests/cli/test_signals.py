"""Signals from the first line to the last: 130 or 143, one sentence, nothing left behind.

Every signal is sent by the run itself at a known point: nothing depends on the machine's speed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import loratool as lt
from tests.faults.process import environment

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")

SIGNALS = ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143))
SAID = "interrupted · inputs are unchanged\n"

OF_PYTHON = re.compile(r"[^\n]*mpd_setminalloc: ignoring request[^\n]*\n\n?")
"""What Python's own decimal prints if its import is interrupted, and begun again later."""

AT_IMPORT = """
import os, runpy, sys

number, name, log, *words = sys.argv[1:]

class Finder:
    def find_spec(self, module, *_):
        if log:
            print(module, file=open(log, "a"))
        if module == name:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), int(number))

sys.meta_path.insert(0, Finder())
sys.argv[1:] = words
runpy.run_module("loratool", run_name="__main__", alter_sys=True)
"""
"""``python -m loratool``, hit when it looks for a module."""

CALLED = """
import atexit, os, sys, time
import loratool as lt
from loratool import cli

def send():
    os.kill(os.getpid(), int(sys.argv[1]))

def wait(*_, **__):
    time.sleep(60)

{body}
cli.main(["inspect", "x"])
"""


def start(code: str, *words: object, **variables: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, timeout=120,
        env=environment() | {k.upper(): str(v) for k, v in variables.items()}, check=False,
    )  # fmt: skip


def hit(
    number: int, module: str, words: Sequence[object], **variables: object
) -> subprocess.CompletedProcess[str]:
    return start(AT_IMPORT, number, module, "", *words, **variables)


def imported(words: Sequence[object], log: Path) -> list[str]:
    """Modules that a run of a command looks for once it has caught the signals."""
    done = start(AT_IMPORT, 0, "", log, *words)
    assert done.returncode == 0, done.stderr
    found = log.read_text().split()
    return list(dict.fromkeys(found[found.index("loratool.cli.signals") + 1 :]))


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    lt.demo(tmp_path / "toy")
    return tmp_path / "toy"


def check(done: subprocess.CompletedProcess[str], code: int, where: object) -> None:
    said = OF_PYTHON.sub("", done.stderr)
    assert (done.returncode, said) == (code, SAID), (where, done)


def test_at_every_import(data: Path, tmp_path: Path) -> None:
    words = ["inspect", data / "llm" / "lora_linear"]
    modules = imported(words, tmp_path / "log")
    assert {"click", "loratool.cli.streams", "loratool.errors"} <= set(modules)
    modules.remove("atexit")  # by then the exit code is settled
    for position, module in enumerate(modules[::5]):
        number, code = SIGNALS[position % 3]
        done = hit(number, module, words)
        check(done, code, module)
        assert done.stdout == ""


@pytest.mark.thin(3)
@pytest.mark.parametrize(("number", "code"), SIGNALS)
@pytest.mark.parametrize("module", ["torch", "numpy", "torch.nn", "loratool.engine.run"])
def test_at_heavy_imports(module: str, number: int, code: int, toy: Path) -> None:
    """Extensions cannot be imported twice: the report needs none of them."""
    words = ["merge", toy / "style", "--base", toy / "base", "-o", toy / "out"]
    done = hit(number, module, words)
    assert (done.returncode, done.stderr) == (code, SAID), done
    assert not list(toy.glob("out*"))


def test_before_anything_is_caught(data: Path) -> None:
    done = hit(signal.SIGINT, "loratool.cli", ["inspect", data])
    assert (done.returncode, done.stderr) == (130, "")


def test_as_json(data: Path) -> None:
    for number, code in SIGNALS:
        done = hit(number, "loratool.api.inspect", ["inspect", data, "--json"])
        found = json.loads(done.stdout)
        assert done.returncode == code and done.stderr == "" and not found["ok"]
        assert found["error"] == {"code": "LT-000", "exit_code": code, "what": "interrupted"}


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_in_a_destructor(number: int, code: int) -> None:
    """Python drops what destructors raise."""
    body = """
class Last:
    def __del__(self):
        send()

def inspect(*a, **k):
    Last()
    wait()

lt.inspect = inspect
"""
    check(start(CALLED.format(body=body), number), code, "destructor")


@pytest.mark.parametrize(("number", "_code"), SIGNALS)
def test_after_the_work(number: int, _code: int, tmp_path: Path) -> None:
    """The output is there and its report printed: that is no interrupted run."""
    body = "atexit.register(wait); atexit.register(send); sys.argv[1:] = sys.argv[1:]\n"
    body += "cli.run = lambda *args: print('all of it') or 5"
    done = start(CALLED.format(body=body), number)
    assert (done.returncode, done.stdout, done.stderr) == (5, "all of it\n", "")


def test_nohup_stays_in_force() -> None:
    body = "lt.inspect = lambda *_, **__: send() or print('still here', flush=True) or exit(0)"
    code = CALLED.format(body=body)
    words = [sys.executable, "-c", code, str(signal.SIGHUP.value)]
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=120, env=environment(),
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "still here\n"), done


# ------------------------------------------------------------------------------- places


def test_in_the_demo(tmp_path: Path) -> None:
    done = hit(signal.SIGTERM, "loratool.cli.verify", ["demo"], tmpdir=tmp_path)
    assert done.returncode == 143 and "$ loratool verify" in done.stdout
    assert done.stderr.endswith(SAID) and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_in_a_recipe(toy: Path) -> None:
    """What earlier steps made stays."""
    recipe = {
        "steps": [
            {"rescale": {"adapters": ["style"], "factor": 0.5, "output": "half"}},
            {"extract": {"tuned": "tuned", "base": "base", "rank": 2, "output": "lora"}},
        ]
    }
    (toy / "recipe.yaml").write_text(json.dumps(recipe))
    done = hit(signal.SIGINT, "loratool.engine.factor_journal", ["run", toy / "recipe.yaml"])
    assert done.returncode == 130 and done.stderr.endswith(SAID)
    assert (toy / "half" / "loratool.json").is_file()
    assert not (toy / "lora").exists() and not list(toy.glob("lora.*"))


PICKLE = """
import os, sys
from loratool import cli
from loratool.store import unpickled

def copy(*_):
    os.kill(os.getpid(), int(sys.argv[1]))

unpickled._copy = copy
cli.main(sys.argv[2:])
"""


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_while_a_child_reads_a_pickle(number: int, code: int, data: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(data / "llm" / "lora_linear", adapter, ignore=lambda *_: ["base"])
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "merged.safetensors").unlink(missing_ok=True)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    tensors = {name.format("A"): torch.zeros(8, 32), name.format("B"): torch.zeros(32, 8)}
    torch.save(tensors, adapter / "adapter_model.bin")
    (tmp_path / "tmp").mkdir()
    words = ["inspect", adapter, "--allow-pickle", "--risk"]
    done = start(PICKLE, number, *words, tmpdir=tmp_path / "tmp")
    check(done, code, "child")
    assert list((tmp_path / "tmp").iterdir()) == []
