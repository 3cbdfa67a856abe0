"""What `loratool.extract` returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from loratool.report.base import Loads, Report


@dataclass(frozen=True)
class ExtractedModule:
    """One factored change.

    Attributes:
        name: module.
        family: last part of the module path.
        shape: of the base weight.
        rank: kept.
        norm: ‖ΔW‖_F of the whole change.
        captured_energy: Σσ²kept ÷ Σσ².
        relative_error: ‖ΔW − ΔW'‖_F ÷ ‖ΔW‖_F.
    """

    name: str
    family: str
    shape: tuple[int, ...]
    rank: int
    norm: float
    captured_energy: float
    relative_error: float


@dataclass(frozen=True)
class ExtractedFamily:
    """Modules of one family together; energy and error over all of them."""

    family: str
    modules: int
    median_rank: float
    captured_energy: float
    relative_error: float


@dataclass(frozen=True)
class LeftOut:
    """A tensor that changed and is not in the adapter."""

    name: str
    shape: tuple[int, ...]
    nbytes: int
    relative_change: float


@dataclass(frozen=True)
class KeptTensor:
    """A tensor kept whole."""

    name: str
    nbytes: int


@dataclass(frozen=True)
class ExtractReport(Report):
    """Result of `loratool.extract`.

    Attributes:
        output: what was (or would be) written.
        tuned: path of the fine-tune.
        base: path of the base.
        tuned_label: the fine-tune as a user knows it.
        base_label: the base as a user knows it.
        rank: asked for.
        modules: what was factored.
        families: the same by family.
        captured_energy: over all factored modules.
        relative_error: over all factored modules.
        kept: tensors kept whole.
        left_out: tensors that changed and are left out.
        identical: tensors equal in both checkpoints.
        buffers: non-float tensors that differ.
        output_bytes: bytes of tensor data.
        peak_memory_bytes: planned.
        seconds: wall time.
        loads: which programs load the adapter.
        warnings: what the user should not overlook.
        notes: what is good to know.
        dry_run: nothing was written.
        plan: the plan, with ``dry_run``.
    """

    command: ClassVar[str] = "extract"
    output: str
    tuned: str
    base: str
    tuned_label: str
    base_label: str
    rank: int
    modules: tuple[ExtractedModule, ...]
    families: tuple[ExtractedFamily, ...]
    captured_energy: float
    relative_error: float
    kept: tuple[KeptTensor, ...]
    left_out: tuple[LeftOut, ...]
    identical: int
    buffers: tuple[str, ...]
    output_bytes: int
    peak_memory_bytes: int
    seconds: float
    loads: tuple[Loads, ...] = ()
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    dry_run: bool = False
    plan: Mapping[str, Any] | None = None
