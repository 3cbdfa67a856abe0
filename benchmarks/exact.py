"""What `--exact` costs: beside the default, on each device.

python -m benchmarks.exact [--size 1.7b|8b] [--layers N] [--device cpu --device cuda]
"""

from __future__ import annotations

from benchmarks import models
from benchmarks.harness import compare, parser, work_folder
from benchmarks.merge import merging


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--size", choices=models.SIZES, default="1.7b")
    options.add_argument("--layers", type=int)
    options.add_argument("--device", action="append", default=[], metavar="cpu|cuda|auto")
    asked = options.parse_args()
    with work_folder(asked) as work:
        folder = models.ensure(work, asked.size, asked.layers)
        cases = [
            merging(f"{device}{', exact' if exact else ''}", folder, device=device, exact=exact)
            for device in asked.device or ["cpu"]
            for exact in (False, True)
        ]
        size = models.gigabytes(folder / "base")
        compare("exact", f"--exact beside the default, {size:.3g} GB bfloat16", cases, asked)


if __name__ == "__main__":
    main()
