"""What `loratool.merge` and `loratool.subtract` return without a base: adapters as one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from loratool.report.algebra import SumModuleReport
from loratool.report.base import Loads, Report


class CombineReport(Report):
    """Result of `loratool.merge` without a base.

    Attributes:
        output: what was (or would be) written.
        adapters: ``{"label", "weight"}`` in order, and ``"components"`` where they have weights.
        method: how they were combined.
        params: of the method, all of them.
        rank: asked for; None = the method's own.
        modules: every module of the result.
        norm: ‖ΔW‖_F of what the method gives before anything is cut or rounded.
        relative_error: of what is stored, against that, over all modules.
        dtype: of the factors.
        kept: replaced tensors carried over or averaged.
        peak_memory_bytes: planned.
        output_bytes: size of the tensor file.
        seconds: wall time.
        loads_in: which programs load it.
        warnings: what the user should not overlook.
        notes: what is good to know.
        dry_run: nothing was written or measured.
        base_model: that the adapters name; None if none does.
    """

    command: ClassVar[str] = "merge"
    output: str
    adapters: tuple[Mapping[str, Any], ...]
    method: str
    params: Mapping[str, Any]
    rank: int | None
    modules: tuple[SumModuleReport, ...]
    norm: float
    relative_error: float
    dtype: str
    kept: tuple[str, ...]
    peak_memory_bytes: int
    output_bytes: int
    seconds: float
    loads_in: tuple[Loads, ...] = ()
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    dry_run: bool = False
    base_model: str | None = None


class DifferenceReport(CombineReport):
    """Result of `loratool.subtract` without merged weights: adapter − Σ weight·adapter.

    The weights of all adapters but the first have their signs turned.
    """

    command: ClassVar[str] = "subtract"
