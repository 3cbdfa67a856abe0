"""Merge one adapter: loratool beside `cp`, bare writing, the naive script and PEFT.

    python -m benchmarks.merge [--size 1.7b|8b] [--device cpu --device cuda --device auto]
                               [--threads 4 --threads 8] [--exact]

Sources lie in the page cache (the warm-up round reads them).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from benchmarks import models
from benchmarks.harness import Case, compare, job, ours, parser, work_folder


def merging(name: str, folder: Path, **more: object) -> Case:
    """Our merge, with options of `loratool.merge`."""
    given = {"adapters": [str(folder / "adapter0")], "base": str(folder / "base"), **more}
    return ours(name, "merge", folder / "out", **given)


def our_cases(folder: Path, asked: argparse.Namespace) -> Iterator[Case]:
    """A case for each device, number of threads and rounding."""
    for exact in (False, True) if asked.exact else (False,):
        for device in asked.device:
            for threads in asked.threads or [None]:
                many = "" if threads is None else f", {threads} threads"
                name = f"loratool {device}{many}{', exact' if exact else ''}"
                yield merging(name, folder, device=device, threads=threads, exact=exact)


def peer_cases(folder: Path, devices: list[str]) -> Iterator[Case]:
    """What else there is to do it with."""
    base, adapter, out = folder / "base", folder / "adapter0", folder / "out"
    yield job("cp", "copy", base, out, output=out)
    yield job("writing as many bytes", "write", base, out, output=out)
    yield job("naive script", "naive_merge", adapter, base, out, output=out)
    for device in (d for d in devices if d != "auto"):
        yield job(f"PEFT {device}", "peft_merge", adapter, base, out, device, output=out,
                  needs="peft")  # fmt: skip


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--size", choices=models.SIZES, default="1.7b")
    options.add_argument("--layers", type=int)
    options.add_argument("--rank", type=int, default=16)
    options.add_argument("--device", action="append", default=[], metavar="cpu|cuda|auto")
    options.add_argument("--threads", type=int, action="append", default=[])
    options.add_argument("--exact", action="store_true", help="that too")
    asked = options.parse_args()
    asked.device = asked.device or ["cpu"]
    with work_folder(asked) as work:
        folder = models.ensure(work, asked.size, asked.layers, rank=asked.rank)
        size = models.gigabytes(folder / "base")
        cases = [*our_cases(folder, asked), *peer_cases(folder, asked.device)]
        title = f"merge rank {asked.rank} into {size:.3g} GB bfloat16 ({asked.size} shapes)"
        compare("merge", title, cases, asked)


if __name__ == "__main__":
    main()
