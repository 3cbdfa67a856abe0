"""``--offline`` and ``HF_HUB_OFFLINE``: no connection is tried, cached revisions work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import loratool as lt
from tests.hub_server import TestHub

GUARD = """
import io, json, socket, sys
from contextlib import redirect_stderr, redirect_stdout

tried = []

def refuse(*where, **_):
    tried.append(repr(where))
    raise OSError("no network in this test")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
socket.create_connection = refuse

from loratool.cli import run

codes = []
for words in json.load(sys.stdin):
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        code = run(words)
    codes.append([code, said.getvalue(), list(tried)])
    tried.clear()
json.dump(codes, sys.stdout)
"""
COMMANDS = [
    ["inspect", "hf://me/style", "--spectrum"],
    ["inspect", "hf://me/base@v1"],
    ["compare", "hf://me/style", "hf://me/loras/sql"],
    ["merge", "hf://me/style:0.5", "--base", "auto", "-o", "merged"],
    ["merge", "hf://me/style", "--base", "me/base@v1", "-o", "x", "--dry-run"],
    ["merge", "hf://me/style", "me/style@v2", "-o", "both"],
    ["extract", "hf://me/tuned", "--base", "hf://me/base", "-o", "made", "--rank", "1"],
    ["compress", "hf://me/style", "-o", "small", "--rank", "1"],
    ["rescale", "hf://me/loras/art/ink", "0.5", "-o", "half"],
    ["verify", "merged", "--base", "hf://me/base", "--adapter", "hf://me/style:0.5"],
    ["verify", "merged"],
    ["subtract", "hf://me/style:0.5", "--from", "merged", "-o", "plain"],
    ["swap", "hf://me/style:0.5", "hf://me/loras/sql", "--in", "merged", "-o", "swapped"],
    ["pull", "me/style@v2", "-o", "pulled"],
    ["pull", "me/loras", "-o", "loras"],
]
GONE = [
    ["inspect", "hf://me/gone"],
    ["compare", "hf://me/style", "me/gone"],
    ["merge", "hf://me/style", "--base", "hf://me/gone", "-o", "y"],
    ["extract", "hf://me/tuned", "--base", "hf://me/gone", "-o", "y"],
    ["rescale", "hf://me/style@v3", "2", "-o", "y"],
    ["pull", "me/gone", "-o", "y"],
]


@pytest.mark.parametrize("how", ["option", "environment"])
def test_no_connection(models: TestHub, several: None, tmp_path: Path, how: str) -> None:
    models.state.repos["me/base"].tags["v1"] = models.state.repos["me/base"].branches["main"]
    models.state.repos["me/style"].tags["v2"] = models.state.repos["me/style"].branches["main"]
    for source in ("me/style", "me/style@v2", "me/loras"):
        lt.pull(source)
    for source in ("hf://me/base", "hf://me/base@v1"):
        lt.extract("hf://me/tuned", base=source, output=tmp_path / f"e{len(source)}", rank=1)
    asked = sum(models.state.requests.values())
    extra = ["--offline"] if how == "option" else []
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env = {"HF_ENDPOINT": models.endpoint, "HF_HOME": str(tmp_path / "hf"),
           "PYTHONPATH": str(Path(__file__).parents[2])}  # fmt: skip
    env |= {"HF_HUB_OFFLINE": "1"} if how == "environment" else {}
    lines = [[*words, *extra] for words in (*COMMANDS, *GONE)]
    (tmp_path / "here").mkdir()
    found = subprocess.run(
        [sys.executable, "-c", GUARD], input=json.dumps(lines), env=clean | env,
        cwd=tmp_path / "here", capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    results = json.loads(found.stdout)
    for words, (code, said, tried) in zip(lines, results, strict=True):
        assert tried == [], words
        if words[: -len(extra) or None] in GONE:
            assert code == 7 and "LT-706" in said, (words, said)
        else:
            assert code == 0, (words, said)
    assert sum(models.state.requests.values()) == asked
