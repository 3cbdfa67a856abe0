"""Extract an adapter from a bfloat16 fine-tune: beside reading both, a naive script, mergekit.

    python -m benchmarks.extract [--size 1.7b|8b] [--layers 2] [--device cuda] [--auto] [--cold]
                                 [--warm] [--naive] [--peer-python PYTHON]

``--peer-python`` is an interpreter with mergekit (see peers.txt), which needs an environment of
its own.  ``--warm``: besides, as the second call of a process, whose GPU is awake.  The naive
script's dense SVDs take seconds per matrix: it only runs with ``--naive``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks import models
from benchmarks.harness import ROOT, Case, clear, compare, job, measure, ours, parser, work_folder


def all_cases(folder: Path, asked: argparse.Namespace) -> Iterator[Case]:
    """Ours by rank and `auto`, and the others."""
    tuned, base, rank = folder / "tuned", folder / "base", asked.rank
    given = {"tuned": str(tuned), "base": str(base), "threads": asked.threads}
    for device in asked.device or ["cpu"]:
        for wanted in (rank, "auto") if asked.auto else (rank,):
            for warm in (False, True)[: 1 + asked.warm]:
                name = f"loratool {device}, rank {wanted}{', second call' if warm else ''}"
                yield ours(name, "extract", folder / "lora", **given, rank=wanted, device=device,
                           warm=warm)  # fmt: skip
    yield job("reading both", "read", "4,16" if asked.cold else "1,2,4,8,16", base, tuned)
    if asked.naive:
        naive = folder / "naive"
        yield job("naive script", "naive_extract", tuned, base, naive, rank, output=naive)
    if asked.peer_python:
        out = folder / "mergekit"
        words = [asked.peer_python, "-m", "mergekit.scripts.extract_lora", "--model", str(tuned),
                 "--base-model", str(base), "--out-path", str(out), "--max-rank", str(rank),
                 *(["--cuda"] if "cuda" in asked.device else [])]  # fmt: skip
        # Offline it fails in its last step, the model card, after the weights are written.
        yield Case("mergekit", words, out, synced=False, proof=out / "adapter_model.safetensors")
    else:
        print("skipped: mergekit (--peer-python is not given)")


def forget(folder: Path) -> None:
    """Drop both checkpoints from the page cache."""
    for file in folder.glob("*/*.safetensors"):
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def print_errors(folder: Path, cases: list[Case]) -> None:
    """Relative error over all matrices of what each case writes."""
    for case in (c for c in cases if c.output):
        measure(case, keep=True)
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.jobs.extract_error", str(folder), str(case.output)],
            capture_output=True, text=True, check=True, cwd=ROOT,
        )  # fmt: skip
        print(f"relative error, {case.name}: {json.loads(done.stdout):.8f}")
        clear(case.output)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--size", choices=models.SIZES, default="1.7b")
    options.add_argument("--layers", type=int)
    options.add_argument("--rank", type=int, default=32)
    options.add_argument("--auto", action="store_true", help="with --rank auto too")
    options.add_argument("--device", action="append", default=[], metavar="cpu|cuda|auto")
    options.add_argument("--threads", type=int)
    options.add_argument("--naive", action="store_true", help="that script too")
    options.add_argument("--peer-python")
    options.add_argument("--warm", action="store_true", help="in a warm process too")
    options.add_argument("--cold", action="store_true", help="read from the disk, not its cache")
    options.add_argument("--errors", action="store_true", help="what each one leaves out")
    asked = options.parse_args()
    with work_folder(asked) as work:
        folder = models.ensure(work, asked.size, asked.layers, tuned=True)
        size = 2 * models.gigabytes(folder / "base")
        cases = list(all_cases(folder, asked))
        where = "disk" if asked.cold else "page cache"
        compare(
            "extract", f"extract rank {asked.rank}, {size:.3g} GB in both checkpoints, {where}",
            cases, asked, before=(lambda: forget(folder)) if asked.cold else None,
        )  # fmt: skip
        if asked.errors:
            print_errors(folder, cases)


if __name__ == "__main__":
    main()
