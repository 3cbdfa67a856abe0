"""Several GPUs of one host beside one: merge, and with --extract extract.

python -m benchmarks.gpus [--gpus 1 --gpus 2] [--size 8b] [--layers N] --work /dev/shm/bench
"""

from __future__ import annotations

from benchmarks import models
from benchmarks.harness import compare, ours, parser, work_folder
from benchmarks.merge import merging


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--size", choices=models.SIZES, default="8b")
    options.add_argument("--layers", type=int)
    options.add_argument("--gpus", type=int, action="append", default=[])
    options.add_argument("--extract", action="store_true", help="that too, rank 32")
    asked = options.parse_args()
    with work_folder(asked) as work:
        folder = models.ensure(work, asked.size, asked.layers, tuned=asked.extract)
        devices = {n: f"cuda:{','.join(map(str, range(n)))}" for n in asked.gpus or [1, 2]}
        cases = [merging(f"merge, {n} GPU", folder, device=d) for n, d in devices.items()]
        if asked.extract:
            pair = {"tuned": str(folder / "tuned"), "base": str(folder / "base"), "rank": 32}
            cases += [ours(f"extract, {n} GPU", "extract", folder / "lora", **pair, device=d)
                      for n, d in devices.items()]  # fmt: skip
        size = models.gigabytes(folder / "base")
        compare("gpus", f"one GPU and several, {size:.3g} GB bfloat16", cases, asked)


if __name__ == "__main__":
    main()
