"""What `loratool.rescale` returns, and what reports on sums of adapters share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from loratool.frozen import Frozen
from loratool.report.base import Failed, Loads, Report


class SumModuleReport(Frozen):
    """One module of Σ weight·ΔW.

    Attributes:
        name: module.
        shape: (out, in) of one matrix.
        rank: of the result.
        sources: positions of the adapters that have it.
        norm: ‖ΔW‖_F of the exact sum.
        relative_error: of what is stored, against the exact sum.
    """

    name: str
    shape: tuple[int, ...]
    rank: int
    sources: tuple[int, ...]
    norm: float
    relative_error: float


class RescaledAdapter(Frozen):
    """One adapter with its ΔW multiplied.

    Attributes:
        source: as named.
        output: what was (or would be) written.
        how: ``copied`` (factor 1), ``alpha`` (configuration only, tensors copied byte for
            byte), ``factors`` (baked into lora_B), ``alpha and sign``, ``dialect`` (another one),
            or ``form`` (that of a program).
        factors: factor -> modules.
        relative_error: ‖stored − exact‖ / ‖exact‖ over all modules.
        dtype: of the factors.
        kept: replaced tensors, which do not scale.
        output_bytes: size of the tensor file.
        loads_in: which programs load it.
        warnings: what the user should not overlook.
        notes: what is good to know.
        intruders: intruder dimensions weakened; None if that was not asked for.
    """

    source: str
    output: str
    how: str
    factors: Mapping[str, int]
    relative_error: float
    dtype: str
    kept: tuple[str, ...]
    output_bytes: int
    loads_in: tuple[Loads, ...] = ()
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    intruders: int | None = None


class RescaleReport(Report):
    """Result of `loratool.rescale`.

    Attributes:
        output: folder that was (or would be) written, or the folder of several.
        factor: for modules that no ``only`` matches.
        adapters: one row per input.
        seconds: wall time.
        dry_run: nothing was written or measured.
        failed: adapters that were left out, with ``keep_going``.
    """

    command: ClassVar[str] = "rescale"
    output: str
    factor: float
    adapters: tuple[RescaledAdapter, ...]
    seconds: float
    dry_run: bool = False
    failed: tuple[Failed, ...] = ()

    @property
    def ok(self) -> bool:
        """False if an adapter was left out."""
        return not self.failed
