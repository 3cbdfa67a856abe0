"""What starting costs: commands that look at headers beside `python -c pass`.

python -m benchmarks.startup [--reps 15]
"""

from __future__ import annotations

import sys

from benchmarks import models
from benchmarks.harness import Case, compare, parser, work_folder


def main() -> None:
    options = parser(__doc__)
    options.set_defaults(reps=15)
    asked = options.parse_args()
    with work_folder(asked) as work:
        folder = models.ensure(work, "tiny", 48)  # 48 layers of 7 modules: 672 tensors
        adapter, out = str(folder / "adapter0"), folder / "out.safetensors"
        ours = (sys.executable, "-m", "loratool")
        cases = [
            Case("python -c pass", (sys.executable, "-c", "pass")),
            Case("--help", (*ours, "--help")),
            Case("merge --help", (*ours, "merge", "--help")),
            Case("inspect, 672 tensors", (*ours, "inspect", adapter)),
            Case("inspect --json", (*ours, "inspect", adapter, "--json")),
            Case("inspect of the base", (*ours, "inspect", str(folder / "base"))),
            Case("convert, bytes copied", (*ours, "convert", adapter, "--to", "kohya", "-o",
                                           str(out), "--base", str(folder / "base")), out),
            Case("import torch", (sys.executable, "-c", "import torch")),
        ]  # fmt: skip
        compare("startup", "whole processes", cases, asked)


if __name__ == "__main__":
    main()
