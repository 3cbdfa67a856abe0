"""Resize an adapter from rank 128 to 32: loratool, files in and out, beside functions in memory.

    python -m benchmarks.compress [--shapes sdxl|4096] [--kohya SD_SCRIPTS]

SD_SCRIPTS is a checkout of github.com/kohya-ss/sd-scripts (see peers.txt), whose function
`resize_lora_model` is called as it is.  Each case says its error over the optimum.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.harness import ROOT, compare, job, parser, work_folder


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--shapes", choices=("sdxl", "4096"), default="sdxl")
    options.add_argument("--kohya", type=Path)
    asked = options.parse_args()
    with work_folder(asked) as work:
        source = work / f"resize-{asked.shapes}"
        subprocess.run(
            [sys.executable, "-m", "benchmarks.jobs.resize", str(source), asked.shapes],
            check=True, cwd=ROOT,
        )  # fmt: skip
        out = work / "resized"
        cases = [
            job("loratool", "resize", source, "ours", out, output=out),
            job("naive script", "resize", source, "naive"),
        ]
        if asked.kohya:
            cases.append(job("kohya", "resize", source, "kohya", asked.kohya))
        else:
            print("skipped: kohya (--kohya is not given)")
        compare("compress", f"resize rank 128 to 32, {asked.shapes} shapes", cases, asked)


if __name__ == "__main__":
    main()
