"""Run a command as a process of its own."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from loratool.store.header import read_header
from loratool.store.reader import read_bytes

ROOT = Path(__file__).parents[2]
COPY = [sys.executable, str(Path(__file__).with_name("copy_run.py"))]
MERGE = [sys.executable, "-m", "loratool", "merge"]


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


def peak_bytes() -> int:
    """The most memory that this process ever had."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0


def cpu_s() -> float:
    """Processor time of this process and of its children that ended."""
    both = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in both)


def tensors_in(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Name -> dtype, shape and bytes."""
    refs = [r for p in folder.glob("*.safetensors") for r in read_header(p).tensors]
    return {r.name: (r.dtype, r.shape, bytes(read_bytes(r))) for r in refs}
