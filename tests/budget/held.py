"""What commands hold in memory beyond the interpreter, and what was planned for them.

Run as a program, in a fresh process: calls on tiny inputs first, which load all there is to load,
then the calls that are measured.  The difference of the two high-water marks is what those hold;
the size of an interpreter with torch is the machine's business (70 MB of it are pages of files,
which the kernel maps and drops as it likes).
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratool.ops.memory import TORCH_BYTES

ROOT = Path(__file__).parents[2]
_PR_SET_THP_DISABLE = 41  # <linux/prctl.h>: with huge pages every buffer counts as whole megabytes

_MMAP = 128 << 10  # bytes, where glibc starts

Call = tuple[str, Sequence[object], dict[str, object]]
"""Name of a function of the API, its arguments, its keywords."""


@dataclass(frozen=True)
class Held:
    """Bytes beyond an interpreter with torch.

    Attributes:
        taken: high-water mark.
        planned: the largest plan.
    """

    taken: int
    planned: int


def measure(warm: Sequence[Call], calls: Sequence[Call], *, is_live: bool = False) -> Held:
    """Run calls in a fresh process.

    Args:
        warm: on tiny inputs.
        calls: those that are measured.
        is_live: count what is alive, not what the allocator keeps of what was freed: glibc lets
            the size from which memory goes back at once grow to 32 MB, in steps that depend on
            the order of threads; it stays at its start here.
    """
    text = json.dumps([warm, calls], default=str)
    environ = {**os.environ, "GLIBC_TUNABLES": f"glibc.malloc.mmap_threshold={_MMAP}"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.budget.held"], input=text, cwd=ROOT, capture_output=True,
        text=True, check=False, env=environ if is_live else None,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    taken, planned = map(int, done.stdout.split()[-2:])
    print(f"{calls[0][0]}: {taken / 1e6:.0f} MB of {planned / 1e6:.0f} planned")
    return Held(taken, planned)


def _high() -> int:
    """VmHWM belongs to this program; ru_maxrss would start at the size of its parent."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def _run(calls: Sequence[Call]) -> None:
    import loratool as lt

    for name, args, options in calls:
        getattr(lt, name)(*args, **options)


def main() -> None:
    from loratool.api import common

    peaks: list[int] = []
    for name in ("plan_memory", "plan_modules"):
        function = getattr(common, name)

        def note(*args: Any, _function: Any = function, **options: Any) -> Any:
            plan = _function(*args, **options)
            peaks.append(plan.peak_bytes)
            return plan

        setattr(common, name, note)
    ctypes.CDLL(None).prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)
    warm, calls = json.load(sys.stdin)
    _run(warm)
    start = _high()
    peaks.clear()
    _run(calls)
    print(_high() - start, max(peaks) - TORCH_BYTES["cpu"])


if __name__ == "__main__":
    main()
