"""What commands hold in memory beside what they plan: how pessimistic the plans are.

    python benchmarks/memory.py [tall wide many square]

The same measurements as `tests/budget`, which only fails where more is held than planned: how
much less it is depends on the machine (its libraries, its allocator, what the data ask for).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.budget import test_memory as budget
from tests.budget.held import measure


def main(names: list[str]) -> None:
    ratios = []
    for shape in names or budget.SHAPES:
        sizes, rank, dtype = budget.SHAPES[shape]
        for command, make in budget.COMMANDS.items():
            with tempfile.TemporaryDirectory() as top:
                budget.adapters(Path(top), sizes, rank=rank, dtype=dtype)
                found = measure([make(Path(top), "tiny-")], [make(Path(top), "")])
            ratios.append(found.planned / max(found.taken, 1))
            print(f"    {shape}, {command}: planned {ratios[-1]:.2f} times what is held")
    ratios.sort()
    middle = ratios[len(ratios) // 2]
    print(f"planned / held: median {middle:.2f}, {ratios[0]:.2f} to {ratios[-1]:.2f}")


if __name__ == "__main__":
    main(sys.argv[1:])
