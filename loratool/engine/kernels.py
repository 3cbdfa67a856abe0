"""op -> kernel.  ``copy`` moves bytes and needs none."""

from loratool.engine.comparing import Compare, CompareBytes
from loratool.engine.factoring import Difference, SubtractAndFactor
from loratool.engine.kernel import Kernel
from loratool.engine.merging import AddDeltas
from loratool.engine.undoing import MakePatch, Restore

KERNELS: dict[str, type[Kernel]] = {
    "add_deltas": AddDeltas,
    "cast": AddDeltas,
    "compare": Compare,
    "compare_bytes": CompareBytes,
    "difference": Difference,
    "make_patch": MakePatch,
    "restore": Restore,
    "subtract_and_factor": SubtractAndFactor,
}
