"""What `loratool.compress` returns."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, ClassVar

from loratool.frozen import Frozen
from loratool.report.base import Failed, Loads, Report, plain_json


class CompressedModule(Frozen):
    """One delta.

    Attributes:
        name: parameter.
        family: last part of the module path.
        rank_before: of the input.
        rank: of the output; 0 = dropped.
        norm: ‖ΔW‖_F before.
        captured_energy: Σσ²kept ÷ Σσ², before rounding.
        relative_error: ‖ΔW − ΔW'‖_F ÷ ‖ΔW‖_F of what is stored.
        is_copied: its factors are the input's, byte for byte.
        sigma: singular values before, descending, experts joined: the first 64.
    """

    name: str
    family: str
    rank_before: int
    rank: int
    norm: float
    captured_energy: float
    relative_error: float
    is_copied: bool
    sigma: tuple[float, ...] = ()


class CompressedFamily(Frozen):
    """Modules of one family together; energy and error over all of them."""

    family: str
    modules: int
    rank_before: float
    rank: float
    captured_energy: float
    relative_error: float


class CompressedAdapter(Frozen):
    """One adapter.

    Attributes:
        source: as named.
        output: folder written.
        modules: its deltas.
        bytes_before: size of the input's tensor file.
        bytes_after: size of the output's.
        captured_energy: over all modules.
        relative_error: over all modules, as stored.
        dropped: modules of rank 0.
        widened: modules stored in float32 since float16 could not hold them.
        is_unchanged: nothing got smaller, so that the output is the input.
        loads_in: which programs load the output.
        notes: what is good to know.
    """

    source: str
    output: str
    modules: tuple[CompressedModule, ...]
    bytes_before: int
    bytes_after: int
    captured_energy: float
    relative_error: float
    dropped: tuple[str, ...] = ()
    widened: tuple[str, ...] = ()
    is_unchanged: bool = False
    loads_in: tuple[Loads, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def families(self) -> tuple[CompressedFamily, ...]:
        """The modules summed up by family, in order of first appearance."""
        groups: dict[str, list[CompressedModule]] = {}
        for module in self.modules:
            groups.setdefault(module.family, []).append(module)
        return tuple(_family(name, members) for name, members in groups.items())


class PlannedCompression(Frozen):
    """What `loratool.compress` is about to do, as ``on_plan`` gets it.

    Attributes:
        adapters: how many.
        modules: of all of them.
        ranks: that they have, each once.
        bytes_before: size of the inputs' tensor files.
        peak_memory_bytes: planned.
        device: where it runs.
        device_reason: why there.
    """

    adapters: int
    modules: int
    ranks: tuple[int, ...]
    bytes_before: int
    peak_memory_bytes: int
    device: str
    device_reason: str


class CompressReport(Report):
    """Result of `loratool.compress`.

    Attributes:
        adapters: one entry per input.
        criteria: what was asked for.
        seconds: wall time.
        dry_run: nothing was written; ranks, sizes and errors are those that would be.
        warnings: what the user should not overlook.
        failed: adapters that were left out, with ``keep_going``.
    """

    command: ClassVar[str] = "compress"
    adapters: tuple[CompressedAdapter, ...]
    criteria: dict[str, Any]
    seconds: float
    dry_run: bool = False
    warnings: tuple[str, ...] = ()
    failed: tuple[Failed, ...] = ()

    @property
    def ok(self) -> bool:
        """False if an adapter was left out."""
        return not self.failed

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON types, with ``families`` in every adapter."""
        adapters = [
            plain_json(one) | {"families": plain_json(one.families)} for one in self.adapters
        ]
        return super().to_json() | {"adapters": adapters}


def energy_and_error(modules: Sequence[CompressedModule]) -> tuple[float, float]:
    """Captured energy and relative error over modules: norms and errors add in squares."""
    whole = math.fsum(m.norm**2 for m in modules)
    if whole == 0:
        return 1.0, 0.0
    kept = math.fsum(m.norm**2 * m.captured_energy for m in modules)
    lost = math.fsum((m.norm * m.relative_error) ** 2 for m in modules)
    return kept / whole, math.sqrt(lost / whole)


def _family(name: str, members: Sequence[CompressedModule]) -> CompressedFamily:
    energy, error = energy_and_error(members)
    before = statistics.median(m.rank_before for m in members)
    rank = statistics.median(m.rank for m in members)
    return CompressedFamily(name, len(members), before, rank, energy, error)
