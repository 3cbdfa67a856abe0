"""op -> kernel.  ``copy`` moves bytes and needs none."""

from loratool.engine.comparing import Compare, CompareBytes
from loratool.engine.compressing import Factor, MeasureSpectrum
from loratool.engine.difference import Difference
from loratool.engine.factoring import SubtractAndFactor
from loratool.engine.kernel import Kernel
from loratool.engine.looking import LookAtBase
from loratool.engine.merging import AddDeltas
from loratool.engine.patching import Complete, MakePatch, Restore

KERNELS: dict[str, type[Kernel]] = {
    "add_deltas": AddDeltas,
    "cast": AddDeltas,
    "compare": Compare,
    "compare_bytes": CompareBytes,
    "complete": Complete,
    "difference": Difference,
    "factor": Factor,
    "look_at_base": LookAtBase,
    "make_patch": MakePatch,
    "restore": Restore,
    "spectrum": MeasureSpectrum,
    "subtract_and_factor": SubtractAndFactor,
}
