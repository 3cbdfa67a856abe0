"""Adapters into one: loratool, files in and out, beside PEFT's arithmetic in memory.

python -m benchmarks.combine [--width 4096] [--modules 1] [--adapters 10] [--method svd|ties-peft]
"""

from __future__ import annotations

import subprocess
import sys

from benchmarks.harness import ROOT, compare, job, ours, parser, work_folder

THEIRS = {"svd": ("svd", {}), "ties-peft": ("ties_svd", {"density": 0.2})}
"""Our method -> PEFT's name, parameters."""


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--width", type=int, default=4096)
    options.add_argument("--modules", type=int, default=1)
    options.add_argument("--adapters", type=int, default=10)
    options.add_argument("--method", choices=THEIRS, default="svd")
    asked = options.parse_args()
    theirs, params = THEIRS[asked.method]
    with work_folder(asked) as work:
        folder = work / f"combine-{asked.width}-{asked.modules}"
        shape = [str(n) for n in (folder, asked.width, asked.modules, asked.adapters)]
        subprocess.run([sys.executable, "-m", "benchmarks.jobs.peft_combine", *shape], check=True,
                       cwd=ROOT)  # fmt: skip
        adapters = [str(folder / f"a{n}") for n in range(asked.adapters)]
        cases = [
            ours("loratool", "combine", folder / "out", adapters=adapters, method=asked.method,
                 params=params, rank=16, weights=[0.1] * len(adapters), provenance=False),
            job(f"PEFT {theirs}", "peft_combine", *shape, theirs, needs="peft"),
        ]  # fmt: skip
        title = (f"{asked.adapters} adapters of rank 16 into one, {asked.method}, "
                 f"{asked.modules} × {asked.width}²")  # fmt: skip
        compare("combine", title, cases, asked)


if __name__ == "__main__":
    main()
