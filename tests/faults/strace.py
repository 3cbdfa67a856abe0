"""Run a command under strace: to inject faults into its system calls, or to read what it did."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
COPY = [sys.executable, str(Path(__file__).with_name("copy_run.py"))]
MERGE = [sys.executable, "-m", "loratool", "merge"]

CHANGING = (
    "write", "pwrite64", "fsync", "rename", "renameat2", "unlink", "unlinkat", "rmdir", "mkdir",
    "ftruncate", "fallocate",
)  # fmt: skip
"""Calls that change the disk: where a run may be hit."""

FAULTS = ("signal=KILL", "error=EIO", "error=ENOSPC")


def strace() -> str:
    """Path of strace; its absence is a failure, or nobody would notice that nothing is tested."""
    found = shutil.which("strace")
    assert found, "the fault tests need strace (apt-get install strace)"
    return found


def environment() -> dict[str, str]:
    more = {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    return os.environ | more | {"HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}


def start(words: Sequence[object], **more: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(w) for w in words], env=environment(), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, **more,
    )  # type: ignore[call-overload,no-any-return]  # fmt: skip


def run(words: Sequence[object], **more: object) -> subprocess.CompletedProcess[str]:
    with start(words, **more) as child:
        out, err = child.communicate(timeout=120)
        return subprocess.CompletedProcess([], child.returncode, out, err)


def run_hit(
    words: Sequence[object], call: str, when: int, fault: str, log: Path
) -> subprocess.CompletedProcess[str]:
    """Run with the ``when``-th ``call`` of a thread hit by a fault.

    strace 6.1 delivers no signal together with ``--seccomp-bpf``, and says nothing about it:
    kills take the slow way, where every call of the program stops it.
    """
    fast = [] if fault.startswith("signal") else ["--seccomp-bpf"]
    inject = ["-e", f"trace={call}", "-e", f"inject={call}:{fault}:when={when}"]
    return run([strace(), "-f", *fast, "-qq", "-o", log, *inject, *words])


@dataclass(frozen=True)
class Call:
    """One system call that returned; descriptors are shown with their path."""

    name: str
    text: str
    result: str
    thread: str

    @property
    def failed(self) -> bool:
        return self.result.startswith("-1")

    @property
    def strings(self) -> list[str]:
        return re.findall(r'"((?:[^"\\]|\\.)*)"', self.text)

    @property
    def fd_path(self) -> str:
        """Path of the descriptor in the first argument."""
        found = re.match(r"\d+<([^>]*)>", self.text)
        return found[1] if found else ""


def trace(words: Sequence[object], log: Path, calls: Sequence[str] = CHANGING) -> list[Call]:
    """The calls of an undisturbed run, in order."""
    done = run(
        [strace(), "-f", "-y", "--seccomp-bpf", "-qq", "-s", "300", "-o", log,
         "-e", f"trace={','.join(calls)}", *words]
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return list(parse(log.read_text()))


def parse(text: str) -> Iterator[Call]:
    waiting: dict[str, str] = {}
    for line in text.splitlines():
        pid, _, rest = line.partition(" ")
        rest = rest.strip()
        if rest.endswith("<unfinished ...>"):
            waiting[pid] = rest.removesuffix("<unfinished ...>")
            continue
        if found := re.match(r"<\.\.\. \w+ resumed>(.*)", rest):
            rest = waiting.pop(pid, "") + found[1]
        if found := re.match(r"(\w+)\((.*)\)\s+= (.*)$", rest):
            yield Call(found[1], found[2], found[3], pid)


def count(calls: Sequence[Call]) -> dict[str, int]:
    """Call -> how often the busiest thread makes it (strace counts per thread)."""
    per_thread = Counter((call.name, call.thread) for call in calls)
    found: dict[str, int] = {}
    for (name, _thread), number in per_thread.items():
        found[name] = max(found.get(name, 0), number)
    return found
