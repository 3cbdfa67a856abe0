"""Work shared among copies of the process: the same results in order, whatever becomes of them."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="copies are made on Linux")

# A process of its own: in a test's there are other threads, and then no copies are made.
FRAME = """
import os, signal
from loratool.ops import copies
copies.usable_cores = lambda: 3
parent = os.getpid()
def work(n):
    {work}
    return n * n, os.getpid()
found = list(copies.results_of(work, range(100)))
assert [square for square, _ in found] == [n * n for n in range(100)]
print(len({{pid for _, pid in found}}), sum(pid == parent for _, pid in found))
"""


def say(work: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", FRAME.format(work=work)]
    return subprocess.run(words, capture_output=True, text=True, timeout=120)


def test_copies_do_all_of_it() -> None:
    assert say("pass").stdout.split() == ["3", "0"]


def test_what_a_killed_copy_leaves_is_done_here() -> None:
    found = say("if n == 50 and os.getpid() != parent: os.kill(os.getpid(), signal.SIGKILL)")
    copies, here = map(int, found.stdout.split())
    assert copies == 4 and here == len(range(50, 100, 3))


def test_an_error_is_raised_here() -> None:
    found = say("if n == 50: raise KeyError(n)")
    assert found.returncode == 1 and "KeyError: 50" in found.stderr


def test_few_things_are_done_here() -> None:
    code = FRAME.format(work="pass").replace("range(100)", "range(40)")
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    assert found.stdout.split() == [b"1", b"40"]


def test_copies_end_when_this_process_is_killed() -> None:
    """What they print into stays open as long as one of them lives."""
    big = "if n == 50 and os.getpid() != parent: os.kill(parent, signal.SIGKILL)"
    code = FRAME.format(work=big).replace("n * n, os.getpid()", "bytes(1 << 17), os.getpid()")
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    assert found.returncode == -9


def test_a_copy_lives_through_a_hang_up_that_its_parent_was_started_to_ignore() -> None:
    """``nohup``: else the copies died with the terminal, and their parent did all again."""
    setting = "signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    hang = "if n == 50 and os.getpid() != parent: os.kill(os.getpid(), signal.SIGHUP)"
    script = FRAME.format(work=hang).replace("parent = ", f"{setting}\nparent = ", 1)
    for text, copies in ((script, "3"), (script.replace(f"{setting}\n", ""), "4")):
        done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True,
                              timeout=120)  # fmt: skip
        assert done.stdout.split()[:1] == [copies], done.stderr
