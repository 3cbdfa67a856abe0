"""What `loratool.extract` returns."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from loratool.frozen import Frozen, field
from loratool.report.base import Loads, Report, plain_json, share


class ExtractedModule(Frozen):
    """One factored change.

    Attributes:
        name: module.
        family: last part of the module path.
        shape: of the base weight.
        rank: kept.
        norm: ‖ΔW‖_F of the whole change.
        captured_energy: Σσ²kept ÷ Σσ².
        relative_error: ‖ΔW − ΔW'‖_F ÷ ‖ΔW‖_F, of the factors as written.
        noise_rank: singular values above the rounding noise of the fine-tune, None if that was
            not asked for.
        noise_rank_is_least: there may be more; it was not looked further.
        energy_rank: least rank with 99 % of the energy above the noise, None if not known.
        noise: expected norm of the rounding noise ÷ ‖ΔW‖_F.
        sigma: singular values that are kept, descending, experts joined: the first 64.
    """

    name: str
    family: str
    shape: tuple[int, ...]
    rank: int
    norm: float
    captured_energy: float
    relative_error: float
    noise_rank: int | None = None
    noise_rank_is_least: bool = False
    energy_rank: int | None = None
    noise: float | None = None
    sigma: tuple[float, ...] = ()

    @property
    def is_at_noise(self) -> bool | None:
        """What is left out is rounding noise alone; None if that was not asked for."""
        if self.noise_rank is None:
            return None
        return self.rank >= self.noise_rank and not self.noise_rank_is_least


class ExtractedFamily(Frozen):
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
    part = share(lost, whole)
    rank = statistics.median(m.rank for m in members)
    return ExtractedFamily(name, len(members), rank, 1 - part, math.sqrt(part))


class SavedResidual(Frozen):
    """The file that gives TUNED back, bit for bit.

    Attributes:
        path: the file.
        nbytes: its size.
        patched: tensors with at least one element that the merge gets otherwise.
        elements: such elements in all.
        whole: tensors stored as they are.
    """

    path: str
    nbytes: int
    patched: int
    elements: int
    whole: int


class ExtractReport(Report):
    """Result of `loratool.extract`.

    Attributes:
        output: what was (or would be) written.
        tuned: the fine-tune as a user knows it.
        base: the base as a user knows it.
        rank: asked for, or ``auto``; None where other criteria alone decide.
        asked: all criteria for the rank, as asked for.
        modules: what was factored.
        kept: (tensor, bytes) of those kept whole.
        left_out: (tensor, shape, bytes, relative change) of those that changed and are not in
            the adapter.
        dropped: (module, ‖ΔW‖_F) of those whose rank came out as 0.
        identical: tensors equal in both checkpoints.
        buffers: non-float tensors that differ and are left out.
        absent: heads of the base that the fine-tune, of another class, has no partner for.
        merge_options: what ``merge`` needs to take the adapter as it was made.
        captured_energy: over all factored modules.
        relative_error: over all factored modules, as written.
        total_relative_error: over all tensors that changed.
        dtype: of the factors, the widest.
        float16_relative_error: ``relative_error`` if the factors were stored as float16.
        float16_bytes: size of the tensor file then.
        holds_whole: the adapter's dialect has a place for whole tensors (``keep``).
        output_bytes: size of the tensor file.
        device: where it was computed.
        device_reason: why there.
        peak_memory_bytes: planned peak.
        residual: the residual file, None if none was asked for.
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
    rank: int | str | None
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
    absent: tuple[str, ...] = ()
    merge_options: tuple[str, ...] = ()
    asked: Mapping[str, Any] = field(default_factory=dict)
    dropped: tuple[tuple[str, float], ...] = ()
    dtype: str = "float32"
    float16_relative_error: float = 0.0
    float16_bytes: int = 0
    holds_whole: bool = True
    residual: SavedResidual | None = None
    device: str = "cpu"
    device_reason: str = ""
    peak_memory_bytes: int = 0

    @property
    def families(self) -> tuple[ExtractedFamily, ...]:
        """The modules summed up by family."""
        return group_families(self.modules)

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON types, with ``families``."""
        named = {
            "modules": [plain_json(m) | {"is_at_noise": m.is_at_noise} for m in self.modules],
            "dropped": [{"name": name, "norm": norm} for name, norm in self.dropped],
            "families": plain_json(self.families),
            "kept": [{"name": name, "nbytes": nbytes} for name, nbytes in self.kept],
            "left_out": [
                {"name": name, "shape": list(shape), "nbytes": nbytes, "relative_change": change}
                for name, shape, nbytes, change in self.left_out
            ],
        }
        return super().to_json() | named
