"""`compress`: fewer ranks for adapters, the best ones."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.adapter import Adapter
from loratool.api.access import parse_size
from loratool.api.beside import with_whole_biases
from loratool.api.common import Limits, Resources, content_label, parse_dtype, plan_resources
from loratool.api.compress_ranks import choose_ranks
from loratool.api.compress_report import CompressJob, Made, compressed, planned
from loratool.api.detach import Detached, detach
from loratool.api.page import check_page, with_page
from loratool.api.session import Session, run_plan
from loratool.api.several import every_one, texts_of
from loratool.delta.forms import kernel_of
from loratool.dialects.registry import home_of
from loratool.frozen import Frozen, asdict, replace
from loratool.ops.compress import CompressPlan, plan_compress, rebuild
from loratool.ops.detach import plan_detach
from loratool.ops.input_notes import unused_warnings
from loratool.ops.inputs import OpenedBase, open_base
from loratool.ops.rank_options import Ranks, ranks_of
from loratool.ops.turns import Turns
from loratool.ops.weights import Weight, names_of
from loratool.options.calls import takes
from loratool.options.groups import Run
from loratool.options.shaping import Compress
from loratool.options.words import recorded
from loratool.report.compress import CompressedAdapter, CompressReport
from loratool.store.adapter_writer import file_bytes, with_record
from loratool.store.provenance import checkpoint_id

if TYPE_CHECKING:
    from loratool.engine.compressing import Factored
    from loratool.plan import Plan


@takes(Compress)
def compress(asked: Compress) -> CompressReport:
    """Truncate the SVD of every delta of one or more adapters; ΔW is never formed.

    Changes that depend on the base are compressed with it: PiSSA and its kin become LoRA, DoRA
    stays DoRA, its rows' lengths set anew.  Criteria combine: the smallest rank wins.  A module
    never gets larger: where fewer ranks would not save bytes its factors are copied.

    Returns:
        Ranks, energy and error per module and in all, as stored.

    Raises:
        LoratoolError: see ``docs/errors.md``.

    Example:
        >>> lt.compress("style", output="small", rank=4).adapters[0].modules[0].rank
        4
    """
    check_page(asked.html, asked.output)
    report = every_one(
        asked, _run, lambda done: {"warnings": tuple(w for report in done for w in report.warnings)}
    )
    return with_page(report, asked.html)


def _run(asked: Compress) -> CompressReport:
    limit = parse_size(asked.size)
    ranks = ranks_of(asked, limit)
    session = Session.begin("compress", asked)
    options = recorded(asked, **{"rank": None, **ranks.rule, "size": limit})
    options |= {"rank_auto": True} if ranks.auto else {}
    texts = texts_of(asked.adapters)
    with session.outputs(len(texts)) as session:
        session, jobs = _open(session, texts, asked.base, parse_dtype(asked.dtype))
        if asked.base is not None and (ranks.auto or "sv_base" in ranks.rule):
            jobs = _look_at_all(session, jobs, asked.base, auto=ranks.auto)
        run = asked.take(Run, progress=None, on_work=asked.on_work if len(jobs) == 1 else None)
        jobs = [replace(job, rules=_rules(job, ranks)) for job in jobs]
        every = [plan_resources(_factor_plan(job), run) for job in jobs]
        turns = session.turns(asked, partial(planned, jobs, every), list(map(_bytes_of, jobs)))
        reports: list[CompressedAdapter] = []
        warnings: list[str] = []
        for job, resources in turns.each(list(zip(jobs, every, strict=True)), _name_of):
            record = session.record(options, job.inputs())
            made = _within(job.recorded(record), _Cut(session, limit, resources, turns))
            written = made.adapter
            if not asked.dry_run:
                _, written = session.put(made.files, job.target, record, job.source.extras)
            warnings += made.warnings
            reports.append(compressed(job, made, written))
    warnings += [f"{j.one.resolved.label}: {w}" for j in jobs for w in unused_warnings(j.source)]
    return CompressReport(tuple(reports), options, session.seconds, asked.dry_run, tuple(warnings))


def _rules(job: CompressJob, ranks: Ranks) -> list[dict[str, Any]]:
    """Of each spec; what is relative to its base is a number then."""
    specs = job.plan.specs
    rules = ranks.of([s.name for s in specs], [kernel_of(s) for s in specs])
    for spec, rule in zip(specs, rules, strict=True):
        if (share := rule.pop("sv_base", None)) is not None:
            least = share * job.norms.get(spec.name, 0.0)
            rule["sv_min"] = max(least, rule.get("sv_min", 0.0))
    return rules


def _factor_plan(job: CompressJob) -> Plan:
    return job.plan.steps("factor", [{"rule": rule} for rule in job.rules])


def _bytes_of(job: CompressJob) -> int:
    return sum(s.nbytes for spec in job.plan.specs for s in spec.fields.values())


def _name_of(turn: tuple[CompressJob, Resources]) -> str:
    return turn[0].one.text


class _Cut(Frozen):
    """How far every adapter is cut, and with what.

    Attributes:
        session: of the command.
        limit: bytes of the weights file at most.
        resources: for the plan.
        turns: told how far it is.
    """

    session: Session
    limit: int | None
    resources: Resources
    turns: Turns

    def watched(self, start: float, stop: float) -> Resources:
        """For a plan that is this part of the work on an adapter."""
        run = replace(self.resources.run, progress=self.turns.part(start, stop))
        return replace(self.resources, run=run)


def _open(
    session: Session, texts: Sequence[str], base: str | Path | None, dtype: str | None
) -> tuple[Session, list[CompressJob]]:
    """Open every input and check every output before any work is done."""
    found = session.in_its_order(session.open(texts, base))
    for one in found:
        session.check_place(one)
        if base is None or not session.translates(
            one.adapter, one.form
        ):  # else it is another change that is written
            session.check(one)
    opened = None
    asks = any(home_of(one.form).asks_config for one in found)
    is_fixed = all(s.is_additive for one in found for s in one.adapter.specs)
    if base is not None and (asks or not is_fixed):
        opened = open_base(str(base), [o.adapter for o in found], session.access)
        session = session.with_base(opened, *(one.form for one in found))
    jobs: list[CompressJob] = []
    for one in found:
        detached = None if opened is None else _detach(one.adapter, opened, session.limits)
        plain = one.adapter if detached is None else detached.adapters[0][0]
        plan = plan_compress(
            plain, one_rank=session.of_peft is not None, original=one.adapter,
            turned=frozenset() if detached is None else detached.plan.turned,
            base_config=None if detached is None else detached.base.checkpoint.config,
            dtype=dtype,
        )  # fmt: skip
        jobs.append(CompressJob(one, plan, detached, base=_recorded_base(session.base)))
    return session, jobs


def _recorded_base(base: OpenedBase | None) -> dict[str, Any]:
    """A base by name and content, empty if there is none."""
    if base is None:
        return {}
    label = content_label(base.resolved, {})
    return {"base": {"name": label, "files": checkpoint_id(base.checkpoint)}}


def _detach(adapter: Adapter, base: OpenedBase, limits: Limits) -> Detached | None:
    """The adapter without its base; None if no change depends on it."""
    if all(spec.is_additive for spec in adapter.specs):
        return None
    adapter = with_whole_biases(adapter, base.checkpoint)
    return detach(plan_detach([(adapter, Weight())], base.checkpoint), base, limits)


def _look_at_all(
    session: Session, jobs: Sequence[CompressJob], base: str | Path, *, auto: bool
) -> list[CompressJob]:
    """`_beside` for every adapter, by one commit of the base that was named."""
    capped: list[CompressJob] = []
    for job in jobs:
        capped.append(_beside(session, job, base, auto=auto))
        name = capped[-1].base["base"]["name"]
        if name.startswith("hf://") and str(base) != "auto":
            base = name
    return capped


def _beside(session: Session, job: CompressJob, base: str | Path, *, auto: bool) -> CompressJob:
    """With the sizes of the base's weights; if ``auto``, with the ranks that a merge resolves."""
    from loratool.api.look import look_at_base

    limits = session.limits
    run = Run(
        device="cpu", threads=limits.threads, max_memory=limits.max_memory,
        executor=limits.executor, ray_address=limits.address,
    )  # fmt: skip
    found, opened = look_at_base(
        job.one.resolved.path, base, read=session.read, access=session.access, run=run
    )
    ranks = {m.name: m.noise_rank for m in found.modules}
    known = [ranks.get(spec.name) for spec in job.plan.specs]
    caps = [None if rank is None else int(rank) for rank in known] if auto else None
    norms = {m.name: m.delta_norm / m.rho for m in found.modules if m.rho}
    return replace(job, caps=caps, norms=norms, base=_recorded_base(opened))


def _within(job: CompressJob, cut: _Cut) -> Made:
    """New factors in the form of a program; zeros that fill up ranks count for the limit too."""
    made = _compress(job, cut)
    session = cut.session
    if session.program is None and not session.translates(job.source, job.one.form):
        return made
    made, budget, limit = _fitted(job, made, cut.session), cut.limit, cut.limit
    while limit is not None and budget is not None and (over := file_bytes(made.files) - limit) > 0:
        budget -= over
        made = _compress(job, replace(cut, limit=budget))
        made = _fitted(job, made, cut.session)
    return made


def _fitted(job: CompressJob, made: Made, session: Session) -> Made:
    form, names = job.one.form, names_of(job.plan.adapter)
    fitted, files = session.fit(made.adapter, form, base_tensors=names)
    is_unchanged = made.is_unchanged and fitted.adapter is job.source
    return replace(
        made, files=with_record(files, job.plan.record), adapter=fitted.adapter,
        is_unchanged=is_unchanged, notes=fitted.notes, warnings=fitted.warnings,
    )  # fmt: skip


def _compress(job: CompressJob, cut: _Cut) -> Made:
    """New factors for every module, within the limit if there is one."""
    from loratool.engine.tying import tie_factors

    plan, original = job.plan, job.original
    results = _factored(job, cut)
    adapter, dropped = rebuild(plan, results)
    if adapter is plan.adapter:
        return Made(original, results, job.source, [], True)
    adapter = tie_factors(adapter)
    if job.detached is not None:
        adapter = job.detached.attach(adapter, cut.session.limits)
    files = plan.files(adapter)
    is_larger = file_bytes(files) >= file_bytes(original)  # block-diagonal factors, written out
    if is_larger and plan.dtype is None:
        return Made(original, _copied(plan, results), job.source, [], True)
    return Made(files, results, adapter, dropped, False)


def _factored(job: CompressJob, cut: _Cut) -> list[Factored]:
    """A result per spec, at the ranks that rule and limit leave."""
    plan, dtypes = job.plan, list(job.plan.dtypes)
    every: list[dict[str, Any]] = [{}] * len(plan.specs)
    spectra, begun = None, 0.0
    if plan.is_grouped or cut.limit is not None:
        spectra, begun = run_plan(plan.steps("spectrum", every), cut.watched(0, 0.5)), 0.5
    while True:
        args = _args(job, cut, dtypes, spectra)
        results: list[Factored] = run_plan(plan.steps("factor", args), cut.watched(begun, 1))
        if spectra is None and not any(r.rank for r in results):
            spectra = run_plan(plan.steps("spectrum", every), cut.resources)
            continue  # all are zero, and PEFT needs one module at least
        widened = [i for i, r in enumerate(results) if r.is_widened and dtypes[i] != "F32"]
        if cut.limit is None or not widened:
            return results
        for i in widened:  # their factors cost more: share the budget out again
            dtypes[i] = "F32"


def _args(
    job: CompressJob, cut: _Cut, dtypes: Sequence[str], spectra: Sequence[Any] | None
) -> list[dict[str, Any]]:
    """Of the step that factors each spec."""
    plan = job.plan
    args = [replace(plan.factor_args(i), rule=rule, dtype=d)
            for i, (rule, d) in enumerate(zip(job.rules, dtypes, strict=True))]  # fmt: skip
    for i, cap in enumerate(job.caps or ()):
        args[i] = replace(args[i], cap=cap)
    if spectra is not None:
        ranks = choose_ranks(plan, spectra, job.rules, cut.limit, dtypes, job.caps)
        for group in plan.groups:
            for i in group.specs:
                args[i] = replace(args[i], rank=ranks[i], is_free=len(group.specs) == 1)
    return [asdict(one) for one in args]


def _copied(plan: CompressPlan, results: Sequence[Factored]) -> list[Factored]:
    return [
        replace(
            r,
            rank=s.rank or s.product_rank,
            kept_square=r.square,
            residual_square=0.0,
            factors=None,
        )
        for s, r in zip(plan.specs, results, strict=True)
    ]
