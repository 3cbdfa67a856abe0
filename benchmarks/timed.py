"""Run one job in this fresh process and print what it took, as JSON in the last line.

python -m benchmarks.timed [--sync PATH] JOB [ARGUMENT …]
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path


def sync_tree(path: Path) -> None:
    """Wait until a file, or all of a folder, is on the disk."""
    for file in [*path.rglob("*"), path]:
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def user_seconds() -> float:
    """Of all cores outside the kernel so far, children that have ended included."""
    times = os.times()
    return times.user + times.children_user


def main(words: list[str]) -> None:
    output = Path(words[1]) if words[0] == "--sync" else None
    job, *arguments = words[2:] if output else words
    work = importlib.import_module(f"benchmarks.jobs.{job}").prepare(arguments)
    start, before = time.perf_counter(), user_seconds()
    numbers = work()
    if output:
        sync_tree(output)
    took = {"job": time.perf_counter() - start, "user s": user_seconds() - before}
    print("\n" + json.dumps({**took, **(numbers or {})}))


if __name__ == "__main__":
    main(sys.argv[1:])
