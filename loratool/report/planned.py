"""What `loratool.convert` and `loratool.rescale` are about to do."""

from __future__ import annotations

from loratool.frozen import Frozen


class PlannedFiles(Frozen):
    """As ``on_plan`` gets it.

    Attributes:
        adapters: how many.
        modules: of all of them.
        computed: modules whose tensors are computed, all others are copied byte for byte; None
            where the work tells (with a base, for a program, into another dialect).
        bytes_before: size of the inputs' tensors.
        peak_memory_bytes: planned for what is computed; None where that is nothing, or not known.
    """

    adapters: int
    modules: int
    computed: int | None
    bytes_before: int
    peak_memory_bytes: int | None
