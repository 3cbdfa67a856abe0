"""What `loratool.merge` and `loratool.verify` return."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from loratool.dtypes import BY_WORD
from loratool.frozen import Frozen
from loratool.report.base import Report


class ModuleLoss(Frozen):
    """What rounding did to the change of one tensor.

    Attributes:
        name: tensor.
        dtype: type it was rounded to.
        rho: ‖ΔW‖ / ‖W‖.
        loss: ‖W' − (W + ΔW)‖ / ‖ΔW‖, measured.
        predicted_loss: the same from the rounding model, before the run.
        changed_share: share of elements that changed.
        predicted_share: the same, predicted.
    """

    name: str
    dtype: str
    rho: float
    loss: float
    predicted_loss: float
    changed_share: float
    predicted_share: float


def wide_options(modules: Sequence[ModuleLoss]) -> str:
    """Options under which rounding takes next to nothing of these changes."""
    is_plain = all(m.dtype in BY_WORD and BY_WORD[m.dtype].is_mergeable for m in modules)
    return "--dtype float32" if is_plain else "--dequantize --dtype float32"


class LeastTime(Frozen):
    """What reading and writing take, at speeds measured just now past the page cache.

    Attributes:
        seconds: wall time at least; arithmetic is not counted.
        read_bytes: of tensors.
        read_speed: bytes per second; None = unknown, and not counted.
        write_bytes: of tensors.
        write_speed: likewise.
    """

    seconds: float
    read_bytes: int
    read_speed: float | None
    write_bytes: int
    write_speed: float | None


class MergeReport(Report):
    """Result of `loratool.merge`.

    Attributes:
        output: what was (or would be) written.
        adapters: ``{"label", "weight"}`` in order.
        base: path of the base.
        base_label: the base as a user knows it.
        changed: tensors with a delta or replacement.
        copied: tensors taken over byte for byte.
        cast: tensors whose only change is the type.
        created: tensors that the base has not.
        skipped: modules left out because that was asked for.
        rule: how names were matched.
        device: where it ran.
        device_reason: why there.
        dtype: type of the changed tensors, or ``mixed``.
        shards: weight files written.
        output_bytes: bytes of tensor data.
        peak_memory_bytes: planned.
        seconds: wall time.
        modules: loss per changed tensor.
        total: loss in all.
        warnings: what the user should not overlook.
        notes: what is good to know.
        sidecars: small files written along.
        tokenizer: where the tokenizer came from, None if there is none.
        dry_run: nothing was written.
        plan: the plan, with ``dry_run``.
        undo: the undo file written along, None if none was asked for.
        undo_bytes: its size.
        least_time: with ``dry_run``, for outputs of some size: what the disks alone will take.
    """

    command: ClassVar[str] = "merge"
    output: str
    adapters: tuple[Mapping[str, Any], ...]
    base: str
    base_label: str
    changed: int
    copied: int
    cast: int
    created: int
    skipped: tuple[str, ...]
    rule: str
    device: str
    device_reason: str
    dtype: str
    shards: int
    output_bytes: int
    peak_memory_bytes: int
    seconds: float
    modules: tuple[ModuleLoss, ...]
    total: ModuleLoss
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    sidecars: tuple[str, ...] = ()
    tokenizer: str | None = None
    dry_run: bool = False
    plan: Mapping[str, Any] | None = None
    undo: str | None = None
    undo_bytes: int = 0
    least_time: LeastTime | None = None


class SubtractReport(MergeReport):
    """Result of `loratool.subtract`: as that of a merge, ``base`` being the merged weights.

    Attributes:
        restored: tensors that are the base's again, bit for bit (with an undo file).
        corrected: elements of theirs that the undo file set right.
        kept: tensors that the merge had left alone, and that are the base's still.
    """

    command: ClassVar[str] = "subtract"
    restored: int = 0
    corrected: int = 0
    kept: int = 0


class SwapReport(MergeReport):
    """Result of `loratool.swap`: as that of a merge, ``base`` being the merged weights."""

    command: ClassVar[str] = "swap"


class TensorDifference(Frozen):
    """A tensor that is not what merging gives.

    Attributes:
        name: tensor.
        elements: how many differ.
        max_ulp: largest distance in units of the last place; 0 where it has no meaning.
        residual: ‖found − expected‖ / ‖ΔW‖ (or of the tensor, where nothing changes).
        reason: in words.
    """

    name: str
    elements: int
    max_ulp: float
    residual: float
    reason: str


class VerifyReport(Report):
    """Result of `loratool.verify`.

    Attributes:
        merged: checkpoint under test, as a user knows it.
        base: the base as a user knows it.
        verdict: ``identical``, ``rounding`` (equal up to rounding) or ``differs``.
        tensors: compared.
        identical: equal bit for bit.
        within_rounding: equal up to rounding.
        differing: the others, worst first.
        missing: tensors that the merge would hold and MERGED lacks.
        unexpected: tensors of MERGED that the merge would not hold.
        seconds: wall time.
        notes: what is good to know.
    """

    command: ClassVar[str] = "verify"
    merged: str
    base: str
    verdict: str
    tensors: int
    identical: int
    within_rounding: int
    differing: tuple[TensorDifference, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """False if MERGED is something else."""
        return self.verdict != "differs"
