"""What `extract` found, as a report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from loratool.adapter import Adapter
from loratool.api.common import Resources
from loratool.api.extract_job import ExtractJob
from loratool.archs.heads import is_other_head
from loratool.bind.bindings import options_needed
from loratool.delta.forms import storage_types
from loratool.dialects.programs import judge_loads
from loratool.dtypes import widest
from loratool.errors import list_some
from loratool.frozen import replace
from loratool.ops.adapter_summary import dtype_word
from loratool.ops.assemble import Outcome
from loratool.ops.extract import ExtractPlan
from loratool.ops.extract_pairs import Pair
from loratool.report.base import root_share, share
from loratool.report.extract import ExtractedModule, ExtractReport, SavedResidual
from loratool.report.families import family_of
from loratool.report.spectrum import MOST_SIGMA
from loratool.report.text import plural


def written_report(
    job: ExtractJob, resources: Resources, outcomes: Sequence[Outcome],
    adapter: Adapter | None = None, *, output_bytes: int = 0,
    residual: SavedResidual | None = None, seconds: float,
) -> ExtractReport:  # fmt: skip
    """The report of a finished run.

    Args:
        job: what was known before.
        resources: for the plan.
        outcomes: what became of every pair.
        adapter: as read back; None = nothing is written.
        output_bytes: size of its tensor file.
        residual: saved beside it.
        seconds: wall time.
    """
    plan = job.plan
    factored = [o for o in outcomes if o.fate == "factored"]
    buffers = tuple(
        o.pair.name for o in outcomes if o.pair.role == "buffer" and o.fate == "left_out"
    )
    low_delta = math.fsum(o.delta_square for o in factored)
    low_residual = math.fsum(o.residual_square for o in factored)
    cast = math.fsum(o.found.cast_square for o in factored if o.found)
    delta = math.fsum(o.delta_square for o in outcomes)
    left = math.fsum(o.residual_square for o in outcomes)
    stored = [s for spec in (adapter.specs if adapter else ()) for s in spec.fields.values()]
    factors = sum(s.nbytes for s in stored if s.dtype == "F32")
    return ExtractReport(
        output=str(job.target),
        tuned=job.tuned.resolved.label,
        base=job.base.resolved.label,
        rank=job.criteria["rank"],
        asked={k: v for k, v in job.criteria.items() if v is not None},
        modules=tuple(_module(plan, o) for o in factored),
        kept=tuple((o.pair.name, o.pair.tuned.nbytes) for o in outcomes if o.fate == "kept"),
        left_out=tuple(
            (o.pair.name, o.pair.tuned.shape, o.pair.tuned.nbytes,
             root_share(o.delta_square, o.weight_square))
            for o in outcomes if o.fate == "left_out" and o.pair.name not in buffers
        ),
        dropped=tuple(
            (plan.memory_names[o.pair.name], math.sqrt(o.delta_square))
            for o in outcomes if o.fate == "dropped"
        ),
        identical=sum(o.fate == "identical" for o in outcomes),
        buffers=buffers,
        captured_energy=1 - share(low_residual, low_delta),
        relative_error=root_share(low_residual, low_delta),
        total_relative_error=root_share(left, delta),
        float16_relative_error=root_share(low_residual + cast, low_delta),
        float16_bytes=output_bytes - factors // 2,
        output_bytes=output_bytes,
        dtype=dtype_word(widest([s.dtype for s in stored])) if stored else "float32",
        device=resources.device,
        device_reason=resources.reason,
        peak_memory_bytes=resources.memory.peak_bytes,
        residual=residual,
        seconds=seconds,
        loads_in=judge_loads(adapter) if adapter is not None else (),
        absent=plan.absent,
        merge_options=options_needed(adapter, job.base.checkpoint) if adapter is not None else (),
        warnings=_foreign([o.pair for o in outcomes if o.fate == "kept"]),
        notes=plan.notes,
        dry_run=False,
    )  # fmt: skip


def wide_factors(adapter: Adapter) -> tuple[str, ...]:
    """A warning about modules of an adapter in float16 that are stored as float32."""
    names = [s.name for s in adapter.specs if "F32" in storage_types(s)]
    return (f"float16 cannot hold {list_some(names, 3)}: float32",) if names else ()


def _foreign(kept: Iterable[Pair]) -> tuple[str, ...]:
    """Tensors kept whole that no model of the base's class has: a projector, a vision tower."""
    names = [p.name for p in kept if p.base is None and p.role not in ("embedding", "head")
             and not is_other_head(p.name)]  # fmt: skip
    if not names:
        return ()
    return (
        f"{plural(len(names), 'kept tensor is', 'kept tensors are')} of parts that the base lacks: "
        f"{list_some(names, 3)}; PEFT loads such only into a model that has these parts",
    )


def planned_report(job: ExtractJob, resources: Resources, seconds: float) -> ExtractReport:
    """What a run would look at; nothing is measured."""
    outcomes = [Outcome(p, "factored" if p.is_factored else "left_out", 0.0, 0.0, 0.0)
                for p in job.plan.pairs]  # fmt: skip
    return replace(written_report(job, resources, outcomes, seconds=seconds), dry_run=True)


def _module(plan: ExtractPlan, outcome: Outcome) -> ExtractedModule:
    name, found = plan.memory_names[outcome.pair.name], outcome.found
    left = share(outcome.residual_square, outcome.delta_square)
    is_noisy = found is not None and found.noise_rank is not None
    return ExtractedModule(
        name=name,
        family=family_of(name),
        shape=outcome.pair.tuned.shape,
        rank=found.rank if found else 0,
        norm=math.sqrt(outcome.delta_square),
        captured_energy=1 - left,
        relative_error=math.sqrt(left),
        noise_rank=found.noise_rank if is_noisy else None,
        noise_rank_is_least=is_noisy and found.is_capped,
        energy_rank=found.energy_rank if is_noisy else None,
        noise=root_share(found.noise_square, outcome.delta_square) if is_noisy else None,
        sigma=tuple(map(math.sqrt, found.spectrum[: min(found.rank, MOST_SIGMA)])) if found else (),
    )
