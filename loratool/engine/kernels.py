"""op -> kernel.  ``copy`` moves bytes and needs none."""

from loratool.engine.comparing import Compare, CompareBytes
from loratool.engine.compressing import Factor, MeasureSpectrum
from loratool.engine.difference import Difference
from loratool.engine.factoring import SubtractAndFactor
from loratool.engine.kernel import Kernel
from loratool.engine.looking import LookAtBase
from loratool.engine.merging import AddDeltas
from loratool.engine.residual import PatchedCopy, PatchedSum, ResidualOfCopy, ResidualOfSum
from loratool.engine.undoing import MakePatch, Restore

KERNELS: dict[str, type[Kernel]] = {
    "add_deltas": AddDeltas,
    "cast": AddDeltas,
    "compare": Compare,
    "compare_bytes": CompareBytes,
    "difference": Difference,
    "factor": Factor,
    "look_at_base": LookAtBase,
    "make_patch": MakePatch,
    "patched_copy": PatchedCopy,
    "patched_sum": PatchedSum,
    "residual_of_copy": ResidualOfCopy,
    "residual_of_sum": ResidualOfSum,
    "restore": Restore,
    "spectrum": MeasureSpectrum,
    "subtract_and_factor": SubtractAndFactor,
}
