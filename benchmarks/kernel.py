"""The merge kernel alone: bytes of bfloat16 weights per second, in memory, by number of threads.

python -m benchmarks.kernel [--threads 1 --threads 2 …] [--width 4096] [--exact]

The job's time is that of 1 GB.
"""

from __future__ import annotations

import os

from benchmarks.harness import compare, job, parser


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--threads", type=int, action="append", default=[])
    options.add_argument("--width", type=int, default=4096)
    options.add_argument("--exact", action="store_true", help="that kernel too")
    asked = options.parse_args()
    cores = len(os.sched_getaffinity(0))
    counts = asked.threads or [n for n in (1, 2, 8, 16) if n <= cores]
    cases = [
        job(f"{n} {'threads' if n > 1 else 'thread'}{mark}", "kernel", n, asked.width, rounding)
        for mark, rounding in (("", "nearest"), (", exact", "exact"))[: 1 + asked.exact]
        for n in counts
    ]
    compare("kernel", f"merge kernel alone, {asked.width}² bfloat16, rank 16, seconds per GB",
            cases, asked)  # fmt: skip


if __name__ == "__main__":
    main()
