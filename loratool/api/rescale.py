"""`rescale`: factor · ΔW."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loratool.adapter import Adapter, AdapterFiles, Source
from loratool.api.beside import with_whole_biases
from loratool.api.common import parse_dtype
from loratool.api.detach import detach
from loratool.api.session import Opened, Session, base_row
from loratool.api.several import every_one, texts_of
from loratool.api.sums import assemble_sum, run_sum
from loratool.delta.forms import exchanged
from loratool.dialects import write_adapter_files
from loratool.dialects.programs import judge_loads
from loratool.dialects.rules import keeps_config
from loratool.errors import UsageError
from loratool.frozen import Frozen, field, replace
from loratool.methods import find_method
from loratool.ops.adapter_summary import dtype_word
from loratool.ops.additive import factor_dtype, require_additive
from loratool.ops.combine import memory_needs as memory_needs_of_sum
from loratool.ops.detach import plan_detach
from loratool.ops.input_notes import unused_warnings
from loratool.ops.inputs import OpenedBase, open_base
from loratool.ops.rescale import RescalePlan, parse_only, plan_rescale, scale_steps
from loratool.ops.sizes import with_sizes
from loratool.ops.sums import plan_sum
from loratool.ops.turns import Turns
from loratool.ops.weights import Weight
from loratool.options.calls import takes
from loratool.options.shaping import Rescale
from loratool.options.words import recorded
from loratool.report.algebra import RescaledAdapter, RescaleReport
from loratool.report.base import root_share
from loratool.report.text import plural

if TYPE_CHECKING:
    from loratool.engine.rescaling import ScaledTensors


@takes(Rescale)
def rescale(asked: Rescale) -> RescaleReport:
    """Multiply ΔW of adapters.

    The factor goes into the configuration's alpha where every alpha stays a whole number (all
    tensors are copied byte for byte then), else into lora_B, rounded once; powers of two are
    exact either way.  With the base W + factor·(new - W) takes the place of replaced tensors, and
    DoRA, PiSSA and their kin scale too; without it the report names what stays as it is.

    Raises:
        LoratoolError: see ``docs/errors.md``.

    Example:
        >>> lt.rescale(["style"], 0.5, output="softer").adapters[0].how
        'alpha'
    """
    return every_one(asked, _rescale, lambda done: {"output": str(asked.output)})


def _rescale(asked: Rescale) -> RescaleReport:
    factor = asked.factor
    if not math.isfinite(factor):
        raise UsageError("LT-262", "not a factor", got=factor, expected="a plain decimal number")
    dtype, patterns = parse_dtype(asked.dtype), parse_only(asked.only)
    session = Session.begin("rescale", asked, in_place=asked.dry_run)
    found = session.in_its_order(session.open(texts_of(asked.adapters), asked.base))
    weak = _check_intruders(asked)
    adapters = [one.adapter for one in found]
    base = None if asked.base is None else open_base(str(asked.base), adapters, session.access)
    session = session.with_base(base, *(one.form for one in found))
    if base is not None:  # another dialect may have other rows
        found = [
            replace(one, adapter=with_sizes(one.adapter, base.checkpoint, "rescaled"))
            if session.translates(one.adapter, one.form) else one for one in found
        ]  # fmt: skip
    jobs = [
        _Job(session, one, plan_rescale(one.adapter, factor, only=patterns, blocks=asked.blocks,
                                        has_base=base is not None), dtype, base)
        for one in found
    ]  # fmt: skip
    memory = [session.limits.plan_steps(scale_steps(job.plan, dtype)) for job in jobs]
    for job in jobs:
        if base is None or not job.translates:  # else it is another change that is written
            session.check(job.one)
    if asked.dry_run:
        rows = [_row(job, None, 0, None) for job in jobs]
    else:
        options = recorded(asked)
        if weak is not None:
            from loratool.engine.device import arithmetic_device

            options["device"] = arithmetic_device("auto").type
        modules = sum(len(job.plan.adapter.specs) for job in jobs)
        peaks = (m.peak_bytes for m in memory)
        with session.making(found, asked, modules, _computed(jobs), peaks) as (session, turns):
            rows = [_run(replace(job, session=session, turns=turns), options, weak)
                    for job in turns.each(jobs, lambda job: job.one.text)]  # fmt: skip
    return RescaleReport(str(asked.output), factor, tuple(rows), session.seconds, asked.dry_run)


class _Job(Frozen):
    """One adapter with its plan.

    Attributes:
        session: of the command.
        one: the adapter and its place.
        plan: its factors.
        dtype: safetensors name of the type asked for; None = as it is.
        base: what it was trained on, if that is known.
        turns: told how far it is.
    """

    session: Session
    one: Opened
    plan: RescalePlan
    dtype: str | None
    base: OpenedBase | None
    turns: Turns = field(default_factory=Turns)

    @property
    def translates(self) -> bool:
        """True if the result is brought into another dialect."""
        return self.session.translates(self.one.adapter, self.one.form)

    def put(
        self,
        files: AdapterFiles,
        options: Mapping[str, Any],
        scaled: ScaledTensors | None = None,
        *,
        with_base: bool = False,
    ) -> RescaledAdapter:
        """Write the result; its row in the report."""
        inputs = self.one.inputs()
        if (with_base or self.session.base is not None) and self.base is not None:
            inputs |= base_row(self.base, inputs)
        record = self.session.record(options, inputs)
        size, written = self.session.put(
            files, self.one.target, record, self.plan.adapter.extras,
            self.turns.part(0 if scaled is None else 0.5, 1),
        )  # fmt: skip
        return _row(self, scaled, size, written)


def _computed(jobs: Sequence[_Job]) -> int | None:
    """Modules whose tensors are computed; with a base or in another form the work tells."""
    if any(j.base or j.session.program or j.translates for j in jobs):
        return None
    return sum(len(scale_steps(job.plan, job.dtype).steps) for job in jobs)


def _check_intruders(asked: Rescale) -> float | None:
    """λ, or None if intruders stay.

    Raises:
        UsageError: LT-294, LT-293, options that do not go together, or a λ out of range.
    """
    intruders = asked.intruders
    if intruders is None:
        return None
    others = asked.only or asked.blocks or asked.dtype != "auto" or asked.program or asked.to
    if asked.base is None or asked.factor != 1 or others:
        raise UsageError(
            "LT-294", "--intruders looks at the adapter as it was trained",
            expected="FACTOR 1, --base BASE, no --only, --blocks, --dtype, --to, --for",
        )  # fmt: skip
    if not 0 <= intruders <= 1:
        raise UsageError("LT-293", "--intruders out of range", expected="0 to 1", got=intruders)
    return intruders


def _run(job: _Job, options: Mapping[str, Any], weak: float | None) -> RescaledAdapter:
    """Scale one adapter in the way that its plan allows."""
    if weak is not None:
        return _mitigate(job, weak, options)
    if job.plan.how == "base":
        return _with_base(job, options)
    if job.translates:
        return _translate(job, options)
    if job.session.program is not None:
        return _fit(job, options)
    scaled = _scale(job)
    return job.put(_files(job.plan, {} if scaled is None else scaled.tensors), options, scaled)


def _fit(job: _Job, options: Mapping[str, Any]) -> RescaledAdapter:
    """In the form of a program: factors go into the scalings, which become one."""
    plan = job.plan
    cast = _scale(_wide(replace(job, plan=replace(plan, baked={}))))
    adapter = plan.adapter if cast is None else _with_tensors(plan.adapter, cast.tensors)
    specs = tuple(replace(s, scaling=s.scaling * plan.factors[s.name]) for s in adapter.specs)
    return _put_fitted(job, replace(adapter, specs=specs), options, cast)


def _translate(job: _Job, options: Mapping[str, Any]) -> RescaledAdapter:
    """In another dialect: what the plan puts into a configuration goes into scalings."""
    plan, scaled = job.plan, _scale(_wide(job))
    adapter = _with_tensors(plan.adapter, {} if scaled is None else scaled.tensors)
    if plan.config != adapter.config:
        specs = (replace(s, scaling=s.scaling * abs(plan.factors[s.name])) for s in adapter.specs)
        adapter = replace(adapter, specs=tuple(specs))
    return _put_fitted(job, adapter, options, scaled)


def _wide(job: _Job) -> _Job:
    """The job in a wide type where a narrow one is asked for: it is rounded to that at the end."""
    return replace(job, dtype="F32") if job.dtype in ("F16", "BF16") else job


def _put_fitted(
    job: _Job, adapter: Adapter, options: Mapping[str, Any], scaled: ScaledTensors | None
) -> RescaledAdapter:
    """Write the result in its form."""
    fitted, files = job.session.fit(adapter, job.one.form, dtype=job.dtype)
    row = job.put(files, options, scaled)
    lost = math.hypot(row.relative_error, fitted.relative_error)
    return replace(
        row, how="dialect" if job.session.program is None else "form", relative_error=lost,
        notes=(*row.notes, *fitted.notes), warnings=(*row.warnings, *fitted.warnings),
        kept=tuple(r.name for r in fitted.adapter.replacements),
    )  # fmt: skip


def _with_base(job: _Job, options: Mapping[str, Any]) -> RescaledAdapter:
    """A sum of one adapter: what depends on the base is scaled with it."""
    assert job.base is not None
    limits, base = job.session.limits, job.base
    adapter = with_whole_biases(job.plan.adapter, base.checkpoint)
    weight = Weight(1.0, by_name=job.plan.factors)
    detached = detach(plan_detach([(adapter, weight)], base.checkpoint), base, limits)
    plan = plan_sum(detached.adapters, verb="rescaled", base=detached.plan.replaced)
    plan = replace(plan, dtype=job.dtype or detached.plan.dtype,
                   is_even=job.session.of_peft is not None)  # fmt: skip
    needs, kept = memory_needs_of_sum(plan, find_method("cat"), None)
    summed = run_sum(plan, None, limits.run_by(limits.plan(needs, kept=kept).threads))
    made = detached.attach(assemble_sum(plan, summed, adapter), limits)
    fitted, files = job.session.fit(made, job.one.form, dtype=job.dtype)
    row = job.put(files, options, with_base=True)
    lost = root_share(math.fsum(m.error_square for m in summed.modules),
                    math.fsum(m.square for m in summed.modules))  # fmt: skip
    return replace(
        row, relative_error=math.hypot(lost, fitted.relative_error), kept=(),
        notes=(*plan.notes, *detached.plan.notes(), *fitted.notes),
        warnings=(*row.warnings, *fitted.warnings),
    )  # fmt: skip


def _mitigate(job: _Job, factor: float, options: Mapping[str, Any]) -> RescaledAdapter:
    """Weaken intruder dimensions; rank, alpha and configuration stay."""
    from loratool.api.risk import mitigate

    assert job.base is not None
    require_additive(job.plan.adapter, "treated")
    found = mitigate(job.plan.adapter, job.base, factor, job.session.limits)
    row = job.put(_files(job.plan, found.tensors), options, with_base=True)
    notes = list(row.notes)
    if found.intruders:
        notes.append(
            f"{plural(found.modules, 'module changes', 'modules change')} by {found.moved:.3g} of "
            f"ΔW; the rank cannot hold {found.relative_error:.3g} of the result"
        )
    if found.skipped:
        notes.append(f"{plural(len(found.skipped), 'module')} on parts of tensors left as before")
    return replace(row, how="intruders", intruders=found.intruders, notes=tuple(notes),
                   relative_error=found.relative_error)  # fmt: skip


def _scale(job: _Job) -> ScaledTensors | None:
    """New tensors; None if all of them are copied."""
    plan, dtype = job.plan, job.dtype
    changes_type = dtype is not None and any(
        f.dtype != dtype for s in plan.adapter.specs for f in s.fields.values()
    )
    if not plan.baked and not changes_type:
        return None
    from loratool.engine.rescaling import join_scaled
    from loratool.engine.run import execute
    from loratool.store.reader import FileReader

    steps = scale_steps(plan, dtype)
    run = replace(job.session.limits.run(steps), progress=job.turns.part(0, 0.5))
    with FileReader() as reader:
        scaled = join_scaled(execute(steps, reader, None, run))
        if scaled.overflow:
            scaled = join_scaled(execute(scale_steps(plan, "F32"), reader, None, run))
        reader.check_unchanged()
    return scaled


def _files(plan: RescalePlan, tensors: Mapping[str, Source]) -> AdapterFiles:
    """The input's files with these tensors and this configuration instead of its own."""
    adapter = plan.adapter
    if keeps_config(adapter):
        again = write_adapter_files(adapter, adapter.dialect)
        return replace(
            again,
            tensors=tuple((key, tensors.get(source.name, source)) for key, source in again.tensors),
            json_files=dict.fromkeys(again.json_files, plan.config),
        )
    return write_adapter_files(_with_tensors(adapter, tensors))


def _with_tensors(adapter: Adapter, tensors: Mapping[str, Source]) -> Adapter:
    """The adapter in memory with some of its tensors exchanged."""
    specs = tuple(exchanged(spec, tensors) for spec in adapter.specs)
    return replace(adapter, specs=specs)


def _row(
    job: _Job, scaled: ScaledTensors | None, size: int, written: Adapter | None
) -> RescaledAdapter:
    adapter, plan = job.plan.adapter, job.plan
    counts: dict[str, int] = {}
    for spec in adapter.specs:
        text = f"{plan.factors[spec.name]:.6g}"
        counts[text] = counts.get(text, 0) + spec.is_matrix
    before = job.dtype or factor_dtype([adapter])
    after = before if written is None else factor_dtype([written])
    warnings = unused_warnings(adapter)
    if after != before:
        warnings.append(f"{dtype_word(before)} cannot hold the factors: written as float32")
    lost = 0.0 if scaled is None else root_share(scaled.error_square, scaled.square)
    return RescaledAdapter(
        source=job.one.text,
        output=str(job.one.target),
        how=plan.how,
        factors=counts,
        relative_error=lost if written is not None else math.nan,
        dtype=dtype_word(after),
        kept=tuple(r.name for r in adapter.replacements),
        output_bytes=size,
        loads_in=() if written is None else judge_loads(written),
        warnings=tuple(warnings),
        notes=plan.notes,
    )
