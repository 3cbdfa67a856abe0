"""What becomes of an adapter that is compressed, and what the report says of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.adapter import Adapter, AdapterFiles
from loratool.api.common import Resources
from loratool.api.detach import Detached
from loratool.api.session import Opened, base_row
from loratool.dialects import write_adapter_files
from loratool.dialects.programs import judge_loads
from loratool.frozen import Frozen, field, replace
from loratool.ops.compress import CompressPlan
from loratool.report.compress import (
    CompressedAdapter,
    CompressedModule,
    PlannedCompression,
    energy_and_error,
)
from loratool.report.families import family_of
from loratool.report.text import plural
from loratool.store.adapter_writer import file_bytes, with_record

if TYPE_CHECKING:
    from loratool.engine.compressing import Factored


class CompressJob(Frozen):
    """One adapter on its way.

    Attributes:
        one: the adapter and its place.
        plan: what is factored.
        detached: it without what depends on the base; None if nothing does.
        rules: of each spec, fields of a `RankRule`.
        caps: noise rank of each spec, None where it has none; None without ``--rank auto``.
        norms: name of a spec -> ‖W‖_F of the base's weight, for ``--sv-base``.
        base: the base of ``--rank auto`` by name and content, as provenance records it.
    """

    one: Opened
    plan: CompressPlan
    detached: Detached | None = None
    rules: Sequence[dict[str, Any]] = ()
    caps: Sequence[int | None] | None = None
    norms: Mapping[str, float] = field(default_factory=dict)
    base: Mapping[str, Any] = field(default_factory=dict)

    @property
    def source(self) -> Adapter:
        """The input."""
        return self.one.adapter

    @property
    def target(self) -> Path:
        """Folder to create."""
        return self.one.target

    @property
    def original(self) -> AdapterFiles:
        """The input as it would be written again."""
        return with_record(write_adapter_files(self.source), self.plan.record)

    def recorded(self, record: Mapping[str, Any]) -> CompressJob:
        """The same, whose result has this provenance."""
        return replace(self, plan=replace(self.plan, record=record))

    def inputs(self) -> dict[str, Any]:
        """What the result is made of, as provenance has it."""
        inputs = self.one.inputs(self.base)
        if self.detached is not None and not self.base:
            inputs |= base_row(self.detached.base, inputs)
        return {**inputs, **self.base}


class Made(Frozen):
    """What became of one adapter."""

    files: AdapterFiles
    results: Sequence[Factored]
    adapter: Adapter
    dropped: Sequence[str]
    is_unchanged: bool
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def planned(jobs: Sequence[CompressJob], resources: Sequence[Resources]) -> PlannedCompression:
    """What is about to be done."""
    specs = [spec for job in jobs for spec in job.plan.specs]
    most = max(resources, key=lambda r: r.memory.peak_bytes)
    return PlannedCompression(
        adapters=len(jobs),
        modules=len(specs),
        ranks=tuple(sorted({spec.rank or spec.product_rank for spec in specs})),
        bytes_before=sum(file_bytes(job.original) for job in jobs),
        peak_memory_bytes=most.memory.peak_bytes,
        device=most.device,
        device_reason=most.reason,
    )


def compressed(job: CompressJob, made: Made, written: Adapter) -> CompressedAdapter:
    """The report's row of an adapter; ``written`` is the result as read back."""
    modules = tuple(
        CompressedModule(
            name=spec.name,
            family=family_of(spec.name),
            rank_before=spec.product_rank,
            rank=result.rank,
            norm=math.sqrt(result.square),
            captured_energy=result.kept_square / result.square if result.square else 1.0,
            relative_error=math.sqrt(result.residual_square / result.square)
            if result.square
            else 0.0,
            is_copied=result.factors is None and result.rank > 0,
            sigma=result.sigma,
        )
        for spec, result in zip(job.plan.specs, made.results, strict=True)
    )
    energy, error = energy_and_error(modules)
    return CompressedAdapter(
        source=job.one.resolved.label,
        output=str(job.target),
        modules=modules,
        bytes_before=file_bytes(job.original),
        bytes_after=file_bytes(made.files),
        captured_energy=energy,
        relative_error=error,
        dropped=tuple(made.dropped),
        widened=tuple(
            s.name for s, r in zip(job.plan.specs, made.results, strict=True) if r.is_widened
        ),
        is_unchanged=made.is_unchanged,
        loads_in=judge_loads(written),
        notes=tuple(_notes(job, made)),
    )


def _notes(job: CompressJob, made: Made) -> list[str]:
    notes = list(job.source.notes)
    if job.detached is not None and not made.is_unchanged:
        notes += job.detached.plan.notes()
    if job.caps is not None:
        without = sum(cap is None for cap in job.caps)
        notes.append(
            "rank auto: singular values above the rounding noise of a merge into the base"
            + (f"; {plural(without, 'module has', 'modules have')} no such rank" if without else "")
        )
    notes += made.notes
    if job.one.resolved.note:
        notes.insert(0, job.one.resolved.note)
    if job.source.unclaimed and not made.is_unchanged:
        notes.append(f"left out: {plural(len(job.source.unclaimed), 'tensor')} that nothing uses")
    return notes
