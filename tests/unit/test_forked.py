"""Worker processes that are copies of their parent: Linux, and no other thread there."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.test_executors import call, contents, inputs

__all__ = ["inputs"]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="others start workers anew")

MERGE = """
import sys
import loratool as lt
from loratool.engine.executors import processes
from loratool.engine.machine import can_fork

real, ways = processes.get_context, []

def watched(way):
    ways.append(way)
    return real(way)

processes.get_context = watched
assert can_fork()
top, out, executor = sys.argv[1:]
lt.merge([top + "/a1", top + "/a2:0.5"], base=top + "/base", output=out, executor=executor,
         threads=2)
print(*ways)
"""

HANGS = """
import os, sys, time
import loratool as lt
from loratool.engine import step

def hang(self, *_):
    os.write(1, b"%d\\n" % os.getpid())
    time.sleep(600)

step.StepWork.process = hang
top, out = sys.argv[1:]
lt.merge([top + "/a1"], base=top + "/base", output=out, executor="processes", threads=2)
"""


def script(text: str, *words: object) -> list[str]:
    return [sys.executable, "-c", text, *map(str, words)]


def merged(top: Path, out: Path, executor: str) -> str:
    done = subprocess.run(
        script(MERGE, top, out, executor), capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_they_write_the_same(inputs: Path, tmp_path: Path) -> None:
    assert merged(inputs, tmp_path / "threads", "threads") == ""
    assert merged(inputs, tmp_path / "processes", "processes") == "fork fork"
    assert contents(tmp_path / "processes") == contents(tmp_path / "threads")


def test_a_killed_parent_leaves_neither_workers_nor_a_lock(inputs: Path, tmp_path: Path) -> None:
    with subprocess.Popen(script(HANGS, inputs, tmp_path / "out"), stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        workers = [int(run.stdout.readline()) for _ in range(2)]
        held = {str(n.readlink()) for w in workers for n in Path(f"/proc/{w}/fd").iterdir()}
        ours = [path for path in held if "out.loratool-partial" in path]
        assert [path for path in ours if not path.endswith(".safetensors")] == []
        run.send_signal(signal.SIGKILL)
        assert run.stdout.read() == b"", "until the last worker has gone"
    assert merged(inputs, tmp_path / "out", "processes") == "fork fork"
    call("merge", inputs, tmp_path / "threads")
    assert contents(tmp_path / "out") == contents(tmp_path / "threads")


def test_other_threads_forbid_copies() -> None:
    """As here: the workers of the tests have threads, or one is made now."""
    check = """
import threading
from loratool.engine.machine import can_fork
assert can_fork()
threading.Thread(target=threading.Event().wait, daemon=True).start()
assert not can_fork()
"""
    subprocess.run(script(check), check=True)
