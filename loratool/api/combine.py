"""`merge` of adapters with each other, and `subtract`, one less the others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loratool.adapter import Adapter
from loratool.api.beside import with_whole_biases
from loratool.api.combine_report import CombineJob, How
from loratool.api.common import Limits, content_label, parse_dtype, watched
from loratool.api.detach import Detached, detach
from loratool.api.page import check_page, with_page
from loratool.api.session import Session, base_row
from loratool.api.sums import assemble_sum, run_sum
from loratool.api.translating import alike
from loratool.bind.same_change import settle_tying
from loratool.dialects.metadata import joined
from loratool.dialects.programs import judge_loads
from loratool.dialects.rules import is_folder
from loratool.errors import MismatchError, UsageError, list_some
from loratool.frozen import replace
from loratool.methods import Method, find_method, parse_params
from loratool.ops.additive import in_one_order
from loratool.ops.batch import output_place
from loratool.ops.combine import arc_weights, memory_needs, plan_combine, rank_of
from loratool.ops.consent import agree_to_read
from loratool.ops.detach import plan_detach
from loratool.ops.fitting import check_fit, check_rank
from loratool.ops.inputs import OpenedAdapter, OpenedBase, guard_output, open_adapters, open_base
from loratool.ops.rank_options import MAX_RANK
from loratool.ops.replaced import compared_ranges
from loratool.ops.sums import SumPlan
from loratool.ops.weights import Weight, read_module_weights, rules_json, unused_rules
from loratool.options.calls import takes
from loratool.options.groups import Mix
from loratool.options.merging import Combine
from loratool.options.words import recorded
from loratool.report.combine import CombineReport, DifferenceReport
from loratool.store.outputs import check_output
from loratool.store.provenance import adapter_id


@takes(Combine)
def combine(asked: Combine) -> CombineReport:
    """Make several adapters one, whose ΔW is Σ weight·ΔW or what a method makes of them.

    With a base, what depends on it (replaced tensors, DoRA, PiSSA) takes part too.

    Returns:
        What every module is made of, and what the rank and the storage type lost.

    Raises:
        LoratoolError: see ``docs/errors.md``.

    Example:
        >>> lt.combine(["style:0.8", "sql"], output="both").method
        'cat'
    """
    return run_combine(asked)


def run_combine(asked: Combine, *, minus: bool = False) -> CombineReport:
    """`combine`, or `subtract` of adapters.

    Args:
        asked: what is combined, and how.
        minus: the first adapter less the others.
    """
    check_page(asked.html, asked.output)
    return with_page(_combine(asked, minus), asked.html)


def _combine(asked: Combine, minus: bool) -> CombineReport:
    session = Session.begin("subtract" if minus else "merge adapters", asked,
                            in_place=asked.dry_run)  # fmt: skip
    how = _how(asked)
    opened = _open(asked, session, how, minus)
    form = session.form(opened[0].adapter)
    if all(o.adapter.dialect == form for o in opened):
        same = in_one_order([o.adapter for o in opened])
        opened = [replace(o, adapter=a) for o, a in zip(opened, same, strict=True)]
    target = output_place(asked.output, form)
    guard_output(target, [*(o.resolved.named for o in opened), asked.module_weights, asked.base])
    adapters = [o.adapter for o in opened]
    agree_to_read(compared_ranges(adapters), yes=asked.yes)
    detached = None
    if asked.base is not None:
        found = open_base(str(asked.base), adapters, session.access)
        opened = [replace(o, adapter=with_whole_biases(o.adapter, found.checkpoint))
                  for o in opened]  # fmt: skip
        detached = _detach(opened, found, how.method, session.limits)
        session = session.with_base(found, form)
    job = _plan(asked, session, how, opened, detached, minus)
    for adapter in adapters if detached is None else ():
        if session.translates(adapter, form):
            session.check_form(adapter, form)
    if asked.dry_run:
        return job.report(None, 0, ())
    check_output(target, is_folder=is_folder(form), force=asked.force, series=asked.series)
    if asked.on_plan is not None:
        asked.on_plan(job.report(None, 0, ()))
    return _make(asked, session, job)


def _how(asked: Combine) -> How:
    """The method and what goes with it.

    Raises:
        UsageError: no such method, parameter or rank.
    """
    row = find_method(asked.method or ("svd" if asked.rank is not None else "cat"))
    if row.name == "cat" and asked.rank is not None:
        row = find_method("svd")
    values = parse_params(row, asked.params)
    table = asked.module_weights
    rules = read_module_weights(Path(table), len(asked.adapters)) if table else ()
    return How(row, values, _checked_rank(asked.rank), rules)


def _open(asked: Combine, session: Session, how: How, minus: bool) -> list[OpenedAdapter]:
    """The adapters with the coefficients that the method gives them."""
    weights = asked.weights
    if minus and weights is not None and len(weights) == len(asked.adapters) - 1:
        weights = (1.0, *weights)
    opened = open_adapters(
        asked.adapters, asked.take(Mix, weights=weights), read=session.read,
        access=session.access, rules=how.rules,
    )  # fmt: skip
    same = alike([settle_tying(o.adapter) for o in opened], session.limits)
    opened = [replace(o, adapter=a) for o, a in zip(opened, same, strict=True)]
    if minus:
        opened = _less_the_others(opened)
    if how.method.is_between:
        arc = arc_weights([o.weight for o in opened], how.method)
        opened = [replace(o, weight=w) for o, w in zip(opened, arc, strict=True)]
    return opened


def _plan(
    asked: Combine,
    session: Session,
    how: How,
    opened: Sequence[OpenedAdapter],
    detached: Detached | None,
    minus: bool,
) -> CombineJob:
    """What goes where, in how much memory, and whether the program would take it."""
    adapters = [o.adapter for o in opened]
    weighed = detached.adapters if detached else [(o.adapter, o.weight) for o in opened]
    if how.method.name == "svd" and how.rank is None:
        how = replace(
            how, rank=max((s.product_rank for a, _ in weighed for s in a.specs), default=1)
        )
    plan = plan_combine(weighed, how.method, verb="subtracted" if minus else "merged",
                        base=detached.plan.replaced if detached else None)  # fmt: skip
    own = () if detached is None else detached.plan.notes()
    plan = replace(plan, notes=(*plan.notes, *own, *unused_rules(adapters, how.rules)))
    if detached is not None:
        plan = replace(plan, dtype=detached.plan.dtype)
    if wanted := parse_dtype(asked.dtype):
        plan = replace(plan, dtype=wanted)
    if session.of_peft is not None:
        plan = replace(plan, is_even=True)
        _check_program(session, plan, how, adapters)
    needs, kept = memory_needs(plan, how.method, how.rank)
    is_large = how.method.space in ("dense", "joint")
    memory = session.limits.plan(
        needs, kept=kept, hint="--method cat, svd or core" if is_large else ""
    )
    kind = DifferenceReport if minus else CombineReport
    return CombineJob(kind, session, how, plan, tuple(opened), detached, memory)


def _make(asked: Combine, session: Session, job: CombineJob) -> CombineReport:
    """Compute, bring into the program's form, write."""
    how, plan, opened, detached = job.how, job.plan, job.opened, job.detached
    form = session.form(opened[0].adapter)
    target = output_place(asked.output, form)
    is_copy = how.method.name == "cat" and asked.dtype == "auto" and detached is None
    if is_copy and [o.weight for o in opened] == [Weight()]:
        adapter, summed = opened[0].adapter, None
    else:
        run = watched(session.limits.run_by(job.memory.threads), asked)
        summed = run_sum(plan, how.rank, run, method=how.method, params=how.params)
        adapter = replace(
            assemble_sum(plan, summed, opened[0].adapter),
            metadata=joined(
                [(o.adapter.label, o.adapter.metadata) for o in opened if o.weight.value > 0]
            ),
        )
        if detached is not None:
            adapter = detached.attach(adapter, session.limits)
    fitted, files = session.fit(adapter, form)
    inputs = _inputs(opened)
    if (base := session.base if detached is None else detached.base) is not None:
        inputs |= base_row(base, inputs)
    options = recorded(
        asked, method=how.method.name, params=dict(how.params), rank=how.rank,
        dtype=asked.dtype, module_weights=rules_json(how.rules),
    )  # fmt: skip
    extras = next((o.adapter.extras for o in opened if o.adapter.extras), {})
    record = session.record(options, inputs)
    size, written = session.put(files, target, record, extras)
    report = job.report(summed, size, judge_loads(written))
    if summed is None:
        report = replace(report, dry_run=False, relative_error=fitted.relative_error)
    return replace(report, notes=(*report.notes, *fitted.notes),
                   warnings=(*report.warnings, *fitted.warnings))  # fmt: skip


def _detach(
    opened: Sequence[OpenedAdapter], base: OpenedBase, method: Method, limits: Limits
) -> Detached | None:
    """What depends on the base, taken apart; None if nothing does.

    Raises:
        MismatchError: LT-418, a method that is no sum has no say in rows of the base.
    """
    plan = plan_detach([(o.adapter, o.weight) for o in opened], base.checkpoint)
    if plan.turned and method.name not in ("cat", "svd"):
        raise MismatchError(
            "LT-418", f"{method.name} works on changes that do not depend on the base",
            key=list_some(sorted(plan.turned), 3), got="DoRA", hint="--method cat or --method svd",
        )  # fmt: skip
    return None if plan.is_idle else detach(plan, base, limits)


def _check_program(session: Session, plan: SumPlan, how: How, adapters: Sequence[Adapter]) -> None:
    """Refuse, before any work, what the program would not load."""
    program = session.of_peft
    assert program is not None
    for adapter in adapters:
        if not session.translates(adapter, session.form(adapter)):
            check_fit(adapter, program)
    ranks = [rank_of(m, how.method, how.rank) for m in plan.modules if not m.is_bias]
    check_rank(max(ranks, default=0), program, adapters[0])


def _less_the_others(opened: Sequence[OpenedAdapter]) -> list[OpenedAdapter]:
    """The first as it is, the others with their signs turned.

    Raises:
        UsageError: LT-297, the first has a weight.
    """
    first, *others = opened
    if first.weight.value != 1 or first.weight.components:
        raise UsageError(
            "LT-297", "subtract takes the first adapter as it is", key=first.resolved.label,
            got=f"weight {first.weight}", hint="loratool rescale multiplies an adapter",
        )  # fmt: skip
    return [first, *(replace(o, weight=o.weight.times(-1)) for o in others)]


def _checked_rank(rank: int | str | None) -> int | None:
    if rank is None:
        return None
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise UsageError("LT-228", "--rank is a whole number", got=rank, hint="--rank 8")
    if not 1 <= rank <= MAX_RANK:
        raise UsageError("LT-229", "--rank out of range", expected=f"1 to {MAX_RANK}", got=rank)
    return rank


def _inputs(opened: Sequence[OpenedAdapter]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for one in opened:
        label = content_label(one.resolved, found)
        found[label] = {**one.weight.to_json(), "files": adapter_id(one.adapter)}
    return found
