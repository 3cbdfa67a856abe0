"""The merge kernel alone: bytes of bfloat16 weights per second, in memory, by number of threads.

python -m benchmarks.kernel [--threads 1 --threads 2 …] [--width 4096] [--exact] [--processes]

The job's time is that of 1 GB.  ``--processes``: besides, as many processes of one thread each, as
the executor of that name has them.
"""

from __future__ import annotations

import os

from benchmarks.harness import compare, job, parser


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--threads", type=int, action="append", default=[])
    options.add_argument("--width", type=int, default=4096)
    options.add_argument("--processes", action="store_true", help="processes too")
    options.add_argument("--exact", action="store_true", help="that kernel too")
    asked = options.parse_args()
    cores = len(os.sched_getaffinity(0))
    counts = asked.threads or [n for n in (1, 2, 8, 16) if n <= cores]
    cases = [
        job(
            f"{n} {word}{('s' if word == 'thread' else 'es') if n > 1 else ''}{mark}",
            "kernel",
            word,
            n,
            asked.width,
            rounding,
        )
        for mark, rounding in (("", "nearest"), (", exact", "exact"))[: 1 + asked.exact]
        for word in ("thread", "process")[: 1 + asked.processes]
        for n in counts
    ]
    compare("kernel", f"merge kernel alone, {asked.width}² bfloat16, rank 16, seconds per GB",
            cases, asked)  # fmt: skip


if __name__ == "__main__":
    main()
