"""TIES of several adapters straight into a base: by device and number of threads.

python -m benchmarks.ties [--layers 6] [--device cpu --device cuda] [--threads 16]
"""

from __future__ import annotations

from benchmarks import models
from benchmarks.harness import compare, parser, work_folder
from benchmarks.merge import merging


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--size", choices=models.SIZES, default="8b")
    options.add_argument("--layers", type=int, default=6)
    options.add_argument("--adapters", type=int, default=8)
    options.add_argument("--device", action="append", default=[], metavar="cpu|cuda|auto")
    options.add_argument("--threads", type=int, action="append", default=[])
    asked = options.parse_args()
    with work_folder(asked) as work:
        folder = models.ensure(work, asked.size, asked.layers, adapters=asked.adapters)
        adapters = [str(folder / f"adapter{n}") for n in range(asked.adapters)]
        cases = [
            merging(f"{device}{'' if threads is None else f', {threads} threads'}", folder,
                    adapters=adapters, method="ties", device=device, threads=threads)
            for device in asked.device or ["cpu"]
            for threads in asked.threads or [None]
        ]  # fmt: skip
        title = f"TIES of {asked.adapters} adapters into {asked.layers} layers of {asked.size}"
        compare("ties", title, cases, asked)


if __name__ == "__main__":
    main()
