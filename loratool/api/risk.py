"""Statistics for `inspect --risk`, intruder dimensions, and their mitigation."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING

from loratool.adapter import Adapter, DeltaSpec, Source, TensorRef
from loratool.api.common import Limits, watched
from loratool.delta.forms import factors_of, is_grouped
from loratool.frozen import Frozen, replace
from loratool.ops.consent import agree_to_read
from loratool.ops.in_base import find_in_base, is_whole
from loratool.ops.inputs import OpenedBase
from loratool.options.groups import Watch
from loratool.plan import Place, Plan, Step, label, module_step
from loratool.report.base import root_share
from loratool.report.families import family_of, place_of
from loratool.report.risk import RiskModule, RiskStatistics, relative_norms
from loratool.report.text import plural

if TYPE_CHECKING:
    from loratool.engine.risk import IntruderResult
    from loratool.store.reader import FileReader

_NOBODY = Watch()
_OUTLIER = 3.0  # standard deviations above the family's mean
_MIN_FAMILY = 4  # modules, fewer have no deviation worth a name


def measure_risk(
    adapter: Adapter,
    base: OpenedBase | None = None,
    *,
    device: str = "auto",
    limits: Limits | None = None,
    yes: bool = False,
    watch: Watch = _NOBODY,
) -> RiskStatistics:
    """Statistics of every additive module; intruder dimensions if there is a base.

    Args:
        adapter: opened.
        base: what it was trained on.
        device: for intruder dimensions; ``auto`` takes a GPU if there is one.
        limits: workers and memory.
        yes: consent to reading much from the Hub.
        watch: who is told how far it is: with the part that reads the base, if there is one.

    Raises:
        MismatchError: the adapter does not belong to the base.
        NumericError: NaN or infinity.
        UsageError: LT-265, much would be read from the Hub without consent.
    """
    limits = limits or Limits()
    specs = [s for s in adapter.specs if _has_numbers(s)]
    plan = Plan("inspect", tuple(module_step("module_statistics", [s]) for s in specs))
    run = limits.run(plan) if base is not None else watched(limits.run(plan), watch)
    from loratool.engine.reads import factor_ranges
    from loratool.engine.run import execute
    from loratool.store.reader import FileReader

    agree_to_read(factor_ranges(specs), yes=yes)
    with FileReader() as reader:
        intruders = (
            {}
            if base is None
            else _all_intruders(adapter, base, reader, limits, device, watch=watch)
        )
        rows = []
        measured = execute(plan, reader, None, run)
        for spec, m in zip(specs, measured, strict=True):
            found = intruders.get(spec.name)
            rows.append(RiskModule(
                spec.name, family_of(spec.name), place_of(spec.name).layer, m.norm, m.sigma_1,
                m.concentration, m.entropy, m.kurtosis, m.sampled,
                intruders=None if found is None else sum(len(f.index) for f in found),
                cosines=() if found is None else tuple(c for f in found for c in f.cosine),
            ))  # fmt: skip
        reader.check_unchanged()
    relative = relative_norms([(r.family, r.norm) for r in rows])
    rows = [replace(r, relative_norm=x) for r, x in zip(rows, relative, strict=True)]
    known = [x for x in relative if not math.isnan(x)]
    spread = statistics.pstdev(known) if known else math.nan
    sizes = {r.family: sum(o.family == r.family for o in rows) for r in rows}
    return RiskStatistics(
        tuple(rows),
        spread,
        tuple(r.name for r in rows if sizes[r.family] >= _MIN_FAMILY
              and r.relative_norm > 1 + _OUTLIER * spread),
        tuple(_embeddings(adapter)),
        tuple(s.name for s in adapter.specs if not _has_numbers(s)),
        None if base is None else base.resolved.label,
    )  # fmt: skip


class Mitigated(Frozen):
    """New factors, and what they are.

    Attributes:
        tensors: key -> new tensor.
        intruders: found in all.
        modules: that have some.
        moved: ‖ΔW' − ΔW‖ / ‖ΔW'‖ over those modules.
        relative_error: what the rank of the adapter could not hold, over those modules.
        skipped: modules that cannot be treated one by one.
    """

    tensors: Mapping[str, Source]
    intruders: int
    modules: int
    moved: float
    relative_error: float
    skipped: tuple[str, ...]


def mitigate(adapter: Adapter, base: OpenedBase, factor: float, limits: Limits) -> Mitigated:
    """Multiply the singular values of intruders in W + ΔW by a factor, at the adapter's rank."""
    from loratool.engine.risk import repack
    from loratool.store.reader import FileReader

    tensors: dict[str, Source] = {}
    skipped: list[str] = []
    count = modules = 0
    moved = error = square = 0.0
    with FileReader() as reader:
        found = _all_intruders(adapter, base, reader, limits, "auto", factor, skipped)
        for spec in adapter.specs:
            results = found.get(spec.name, [])
            if not any(r.index for r in results):
                continue
            count += sum(len(r.index) for r in results)
            modules += 1
            square += sum(r.square for r in results)
            moved += sum(r.moved_square for r in results)
            error += sum(r.error_square for r in results)
            packed = repack(spec, [r.pair for r in results if r.pair is not None])
            for ref, source in zip(factors_of(spec), factors_of(packed), strict=True):
                assert isinstance(ref, TensorRef)
                tensors[ref.name] = source
        reader.check_unchanged()
    return Mitigated(
        tensors,
        count,
        modules,
        root_share(moved, square),
        root_share(error, square),
        tuple(skipped),
    )


def _all_intruders(
    adapter: Adapter,
    base: OpenedBase,
    reader: FileReader,
    limits: Limits,
    device: str,
    factor: float | None = None,
    skipped: list[str] | None = None,
    watch: Watch = _NOBODY,
) -> dict[str, list[IntruderResult]]:
    """Spec name -> one result per matrix, in the order of the experts."""
    from loratool.engine.run import execute

    tasks: list[Place] = []
    for name, places in find_in_base(adapter, base.checkpoint).places.items():
        spec = places[0].part.spec
        if not spec.has_factors or not _has_numbers(spec):
            continue
        if factor is not None and not (spec.is_pair and is_whole(spec, places)):
            (skipped if skipped is not None else []).append(name)
            continue
        tasks += places
    plan = Plan("inspect", tuple(_intruder_step(place, factor) for place in tasks))
    results = execute(plan, reader, None, watched(limits.run(plan, device=device), watch))
    found: dict[str, list[IntruderResult]] = {}
    for place, result in zip(tasks, results, strict=True):
        found.setdefault(place.part.spec.name, []).append(result)
    return found


def _intruder_step(place: Place, weaken: float | None) -> Step:
    return Step("find_intruders", label(place.part.spec.name), (place.source,), place.view,
                (place.part,), args={"weaken": weaken})  # fmt: skip


def _has_numbers(spec: DeltaSpec) -> bool:
    return spec.is_additive and not is_grouped(spec)


def _embeddings(adapter: Adapter) -> list[str]:
    """Changed input embeddings and output heads: they act on single tokens."""
    words = ("embed", "wte", "wpe", "lm_head", "embed_out", "shared.weight")
    found = [f"{s.name} (LoRA)" for s in adapter.specs if any(w in s.name for w in words)]
    found += [
        f"{r.name} ({'replaced' if r.rows is None else plural(len(r.rows), 'row') + ' replaced'})"
        for r in adapter.replacements
        if any(w in r.name for w in words)
    ]
    return found
