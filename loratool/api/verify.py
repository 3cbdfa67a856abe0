"""`verify`: recompute a merge and compare."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from loratool.api.access import access_of
from loratool.api.anchored import anchor
from loratool.api.common import plan_resources, rounding_args
from loratool.api.merge_job import SPLIT, MergeJob, MergeRequest, Operation, prepare_merge
from loratool.api.open_residual import block_elements, check_partner, open_residual
from loratool.api.session import run_plan
from loratool.errors import UsageError
from loratool.frozen import replace
from loratool.ops.access import Access, locate
from loratool.ops.combine import combination_args
from loratool.ops.replay import (
    ORIGINAL,
    Record,
    RecordedSums,
    find_replay,
    find_role,
    merge_record,
    refuse_record,
)
from loratool.ops.subtract import without_overwritten
from loratool.ops.verify import VerifyPlan, plan_verify, under_names_of
from loratool.ops.weights import read_module_weights, rules_from
from loratool.options.calls import takes
from loratool.options.groups import Codes, Mix, Names, Run
from loratool.options.merging import Verify
from loratool.report.merge import TensorDifference, VerifyReport
from loratool.store.address import Address
from loratool.store.checkpoint import Checkpoint, open_checkpoint
from loratool.store.source import AdapterArgument, Resolved


@takes(Verify)
def verify(asked: Verify) -> VerifyReport:
    """Recompute W + Σ weight·ΔW and compare it with a merged checkpoint, tensor by tensor.

    The verdict is ``identical`` (every bit), ``rounding`` (no element further away than another
    order of the same arithmetic explains, see ``docs/exactness.md``) or ``differs``.  How sums
    were rounded is taken from the checkpoint's provenance; so is whatever is not given: the base
    and the residual, looked for beside it and in the working folder, and without adapters all that
    was said of them.

    Raises:
        LoratoolError: see ``docs/errors.md``.

    Example:
        >>> _ = lt.merge(["style"], base="base", output="merged")
        >>> lt.verify("merged").verdict
        'identical'
    """
    started = time.monotonic()
    access = access_of(asked)
    resolved = locate(str(asked.merged), kind="base", access=access)
    merged = open_checkpoint(resolved.path, max_header=access.rules.max_header)
    record = merge_record(merged)
    request = _request(asked, access, merged, record, _home_of(resolved))
    try:
        job = prepare_merge(request)
    except UsageError as error:
        if error.code in _OF_RECORDS and (not asked.adapters or error.code in _OF_ROUNDING):
            refuse_record(merged, error.message())
        raise
    if request.residual is not None:
        check_partner(request.residual, job.adapters[0])
    plan = plan_verify(job.merge.plan, job.full_names, under_names_of(merged, job.checkpoint))
    resources = plan_resources(plan.plan, asked.take(Run), allow_nonfinite=asked.allow_nonfinite,
                               block_elements=block_elements(request.residual))  # fmt: skip
    found = run_plan(plan.plan, resources)
    results = [replace(r, name=name) for r, name in zip(found, plan.names, strict=True)]
    return _report(job, resolved.label, plan, results, started)


def _home_of(merged: Resolved) -> Path:
    """The folder in which its inputs may lie beside it; of an object store an address."""
    named = merged.named
    return named.parent if isinstance(named, Address) else merged.path.absolute().parent


def _request(
    asked: Verify, access: Access, merged: Checkpoint, record: Record | None, home: Path
) -> MergeRequest:
    """The merge that is to be repeated: as given, else as recorded."""
    said: RecordedSums = {} if record is None else record.options
    names, mix = asked.take(Names), asked.take(Mix)
    inputs: Sequence[str | Path | AdapterArgument] = asked.adapters
    base = asked.base
    where: dict[str, Any] = {
        "roots": tuple(dict.fromkeys((home, Path.cwd()))),
        "look": lambda place, kind: locate(str(place), kind=kind, access=access),
    }
    if not inputs or base is None:
        given = None if base is None else str(base)
        replay = find_replay(record, merged, base=given, **where)
        base = replay.base
        if not inputs:
            inputs, mix = replay.adapters, Mix()
            names = Names() if record is None else record.names
    if asked.module_weights is not None:
        rules = read_module_weights(Path(asked.module_weights), len(inputs))
    else:  # of other adapters than those given they say nothing
        recorded = rules_from(said.get("module_weights", ()), partial(refuse_record, merged))
        rules = tuple(r for r in recorded if len(r[1]) == len(inputs))
    rounding, rest = _rounding(merged, said), None
    residual = asked.residual or find_role(record, merged, "residual", "--residual", **where)
    if residual is not None:  # it knows each tensor's type, and how it was rounded
        rest, names = open_residual(residual, inputs, names, access)
        rounding = rounding_args(True, "nearest", None)
    original = find_role(record, merged, ORIGINAL, **where)
    return MergeRequest(
        inputs, base, names, access, mix, rules=rules, rounding=rounding,
        operation=_operation(record, len(inputs), partial(anchor, base=original, access=access)),
        like=None if rest is not None else merged, residual=rest,
        codes=Codes(dequantize=said.get("dequantize", False), requant=said.get("requant", False),
                    simulate_quant=said.get("simulate_quant")),
    )  # fmt: skip


def _operation(
    record: Record | None, count: int, replan: Callable[[MergeJob], MergeJob]
) -> Operation:
    """What the engine was used for; weights have their signs already."""
    if record is None or record.operation == "merge":
        return Operation()
    if record.operation == "split":
        return SPLIT
    check = without_overwritten if record.operation == "swap" and count == 2 else None
    return Operation(record.operation, (1,) * count, check=check, replan=replan)


_OF_ROUNDING = ("LT-217", "LT-218", "LT-255", "LT-256", "LT-257", "LT-286")
_OF_RECORDS = ("LT-240", "LT-241", "LT-242", "LT-243", "LT-244", "LT-281", *_OF_ROUNDING)
"""Usage errors that a record can make: it is damaged then."""


def _rounding(merged: Checkpoint, said: RecordedSums) -> dict[str, Any]:
    """How sums were formed.

    Raises:
        MismatchError: LT-458, what is recorded cannot be meant.
    """
    how = said.get("rounding", "nearest")
    is_exact = how == "exact"
    try:
        return {
            **rounding_args(is_exact, "nearest" if is_exact else how, said.get("seed")),
            **combination_args(said.get("method"), said.get("params"), rank=None, exact=is_exact),
        }
    except UsageError as error:
        refuse_record(merged, error.message())


def _report(
    job: MergeJob, label: str, plan: VerifyPlan, results: Sequence[Any], started: float
) -> VerifyReport:
    differing = [
        TensorDifference(name=name, elements=0, max_ulp=0.0, residual=0.0, reason=reason)
        for name, reason in plan.unlike
    ]
    identical = within = 0
    for result in results:
        if result.differing == 0:
            identical += 1
        elif result.outside == 0:
            within += 1
        else:
            differing.append(_difference(result))
    failed = differing or plan.missing or plan.unexpected
    verdict = "differs" if failed else "rounding" if within else "identical"
    return VerifyReport(
        merged=label,
        base=job.base.resolved.label,
        verdict=verdict,
        tensors=len(results),
        identical=identical,
        within_rounding=within,
        differing=tuple(differing),
        missing=plan.missing,
        unexpected=plan.unexpected,
        seconds=time.monotonic() - started,
        notes=tuple(job.merge.notes),
    )


def _difference(result: Any) -> TensorDifference:
    if not result.delta_square:
        reason = "changed, but no adapter touches it"
        return TensorDifference(result.name, result.outside, result.max_ulp, 0.0, reason)
    residual = math.sqrt(result.residual_square / result.delta_square)
    times = 1 + result.along / result.delta_square
    is_multiple = abs(abs(times - 1) - residual) < 0.01 * residual
    reason = f"the change is there {times:.3g} times" if is_multiple else "another change"
    if abs(times) < 0.01 and abs(residual - 1) < 0.01:
        reason = "the change is missing"
    return TensorDifference(result.name, result.outside, result.max_ulp, residual, reason)
