"""What `loratool.extract` returns."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from loratool.report.base import Loads, Report, plain_json


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


def group_families(modules: Sequence[ExtractedModule]) -> tuple[ExtractedFamily, ...]:
    """Sum up modules by family, in order of first appearance."""
    groups: dict[str, list[ExtractedModule]] = {}
    for module in modules:
        groups.setdefault(module.family, []).append(module)
    return tuple(_family(name, members) for name, members in groups.items())


def _family(name: str, members: Sequence[ExtractedModule]) -> ExtractedFamily:
    squares = [m.norm**2 for m in members]
    lost = math.fsum(s * m.relative_error**2 for s, m in zip(squares, members, strict=True))
    whole = math.fsum(squares)
    share = lost / whole if whole > 0 else 0.0
    rank = statistics.median(m.rank for m in members)
    return ExtractedFamily(name, len(members), rank, 1 - share, math.sqrt(share))


@dataclass(frozen=True)
class ExtractReport(Report):
    """Result of `loratool.extract`.

    Attributes:
        output: what was (or would be) written.
        tuned: the fine-tune as a user knows it.
        base: the base as a user knows it.
        rank: asked for.
        modules: what was factored.
        kept: (tensor, bytes) of those kept whole.
        left_out: (tensor, shape, bytes, relative change) of those that changed and are not in
            the adapter.
        identical: tensors equal in both checkpoints.
        buffers: non-float tensors that differ and are left out.
        captured_energy: over all factored modules.
        relative_error: over all factored modules.
        total_relative_error: over all tensors that changed.
        output_bytes: size of the tensor file.
        seconds: wall time.
        loads_in: which programs load the adapter.
        warnings: what the user should not overlook.
        notes: what is good to know.
        dry_run: nothing was written, and nothing was measured.
    """

    command: ClassVar[str] = "extract"
    output: str
    tuned: str
    base: str
    rank: int
    modules: tuple[ExtractedModule, ...]
    kept: tuple[tuple[str, int], ...]
    left_out: tuple[tuple[str, tuple[int, ...], int, float], ...]
    identical: int
    buffers: tuple[str, ...]
    captured_energy: float
    relative_error: float
    total_relative_error: float
    output_bytes: int
    seconds: float
    loads_in: tuple[Loads, ...] = ()
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    dry_run: bool = False

    @property
    def families(self) -> tuple[ExtractedFamily, ...]:
        """The modules summed up by family."""
        return group_families(self.modules)

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON types, with ``families``."""
        named = {
            "families": plain_json(self.families),
            "kept": [{"name": name, "nbytes": nbytes} for name, nbytes in self.kept],
            "left_out": [
                {"name": name, "shape": list(shape), "nbytes": nbytes, "relative_change": change}
                for name, shape, nbytes, change in self.left_out
            ],
        }
        return super().to_json() | named
