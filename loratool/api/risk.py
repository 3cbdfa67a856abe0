"""Statistics for `inspect --risk`, intruder dimensions, and their mitigation."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loratool.adapter import Adapter, DeltaSpec, Source, TensorRef
from loratool.api.common import Limits
from loratool.errors import MismatchError
from loratool.ops.additive import is_grouped
from loratool.ops.bind import BindOptions, BoundDelta, bind
from loratool.ops.compare import family_of, layer_of
from loratool.ops.consent import agree_to_read
from loratool.ops.heads import take_heads
from loratool.ops.inputs import OpenedBase
from loratool.ops.memory_formulas import factor_bytes, intruder_bytes, measured_bytes
from loratool.ops.merge import matrix_view
from loratool.plan import DeltaPart
from loratool.report.risk import RiskModule, RiskStatistics, relative_norms

if TYPE_CHECKING:
    from loratool.engine.kernel import Env
    from loratool.engine.risk import IntruderResult

_OUTLIER = 3.0  # standard deviations above the family's mean
_MIN_FAMILY = 4  # modules, fewer have no deviation worth a name


def measure_risk(
    adapter: Adapter,
    base: OpenedBase | None = None,
    *,
    device: str = "auto",
    limits: Limits | None = None,
    yes: bool = False,
) -> RiskStatistics:
    """Statistics of every additive module; intruder dimensions if there is a base.

    Args:
        adapter: opened.
        base: what it was trained on.
        device: for intruder dimensions; ``auto`` takes a GPU if there is one.
        limits: workers and memory.
        yes: consent to reading much from the Hub.

    Raises:
        MismatchError: the adapter does not belong to the base.
        NumericError: NaN or infinity.
        UsageError: LT-265, much would be read from the Hub without consent.
    """
    limits = limits or Limits()
    specs = [s for s in adapter.specs if _has_numbers(s)]
    memory = limits.plan(map(measured_bytes, specs))
    from loratool.engine.factors import make_env
    from loratool.engine.reads import factor_ranges
    from loratool.engine.risk import measure_module
    from loratool.engine.workers import map_in_workers
    from loratool.store.reader import FileReader

    ranges = list(factor_ranges(specs))
    agree_to_read(ranges, yes=yes)
    with FileReader() as reader:
        reader.expect(ranges)
        env = make_env(reader)
        intruders = {} if base is None else _all_intruders(adapter, base, _on(device, env), limits)
        rows = []
        measured = map_in_workers(lambda s: measure_module(s, env), specs, memory.threads)
        for spec, m in zip(specs, measured, strict=True):
            found = intruders.get(spec.name)
            rows.append(RiskModule(
                spec.name, family_of(spec), layer_of(spec.name), m.norm, m.sigma_1,
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


@dataclass(frozen=True)
class Mitigated:
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
    from loratool.engine.factors import make_env
    from loratool.engine.risk import repack
    from loratool.store.reader import FileReader

    tensors: dict[str, Source] = {}
    skipped: list[str] = []
    count = modules = 0
    moved = error = square = 0.0
    with FileReader() as reader:
        env = make_env(reader)
        found = _all_intruders(adapter, base, _on("auto", env), limits, factor, skipped)
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
            for role, source in packed.items():
                ref = spec.fields[role]
                assert isinstance(ref, TensorRef)
                tensors[ref.name] = source
        reader.check_unchanged()
    return Mitigated(
        tensors, count, modules, _share(moved, square), _share(error, square), tuple(skipped)
    )


def _on(device: str, env: Env) -> Env:
    """The same with the device for products of whole weights."""
    from loratool.engine.device import resolve_device

    return replace(env, device=resolve_device(device, is_arithmetic=True)[0])


def _all_intruders(
    adapter: Adapter,
    base: OpenedBase,
    env: Env,
    limits: Limits,
    factor: float | None = None,
    skipped: list[str] | None = None,
) -> dict[str, list[IntruderResult]]:
    """Spec name -> one result per matrix, in the order of the experts."""
    from loratool.engine.risk import look_for_intruders
    from loratool.engine.workers import map_in_workers

    if base.checkpoint.quantization is not None:
        raise MismatchError(
            "LT-480", "a quantised checkpoint has no plain weights to look at",
            file=base.checkpoint.path, got=base.checkpoint.quantization,
            hint="use the 16-bit checkpoint",
        )  # fmt: skip
    headed = take_heads([adapter], base.checkpoint).checkpoint
    bindings = bind(adapter, headed, BindOptions(untie=True))  # each tensor beside its own change
    checkpoint = bindings.checkpoint or base.checkpoint
    own = {b.target: b.replacement.source for b in bindings.replacements
           if b.replacement.rows is None}  # fmt: skip
    by_spec: dict[str, list[BoundDelta]] = {}
    for bound in bindings.deltas:
        if bound.spec.kind == "lowrank" and _has_numbers(bound.spec):
            by_spec.setdefault(bound.spec.name, []).append(bound)
    tasks: list[tuple[DeltaPart, Source, tuple[int, int]]] = []
    for name, places in by_spec.items():
        if factor is not None and not _is_whole(places):
            (skipped if skipped is not None else []).append(name)
            continue
        for bound in sorted(places, key=lambda b: b.expert or 0):
            target = bindings.new_tensors.get(bound.target, bound.target)
            ref = own.get(target, checkpoint.tensors[target])
            part = DeltaPart(bound.spec, 1.0, bound.region, bound.expert, bound.transposed)
            tasks.append((part, ref, matrix_view(ref.shape, [part])))
    kept = 0 if factor is None else 2 * sum(factor_bytes(s) for s in adapter.specs)
    memory = limits.plan((intruder_bytes(p, ref) for p, ref, _ in tasks), kept=kept)
    results = map_in_workers(
        lambda task: look_for_intruders(*task, env, factor), tasks,
        1 if env.device.type == "cuda" else memory.threads,
    )  # fmt: skip
    found: dict[str, list[IntruderResult]] = {}
    for (part, _, _), result in zip(tasks, results, strict=True):
        found.setdefault(part.spec.name, []).append(result)
    return found


def _is_whole(places: list[BoundDelta]) -> bool:
    """True if every matrix of the spec has one place, so that its factors can be exchanged."""
    spec = places[0].spec
    cut = any(b.region.source_rows or b.region.source_cols for b in places)
    return len(places) == max(1, spec.experts) and not cut and spec.blocks is None


def _has_numbers(spec: DeltaSpec) -> bool:
    return spec.is_additive and not is_grouped(spec)


def _embeddings(adapter: Adapter) -> list[str]:
    """Changed input embeddings and output heads: they act on single tokens."""
    words = ("embed", "wte", "wpe", "lm_head", "embed_out", "shared.weight")
    found = [f"{s.name} (LoRA)" for s in adapter.specs if any(w in s.name for w in words)]
    found += [
        f"{r.name} ({'replaced' if r.rows is None else f'{len(r.rows)} rows replaced'})"
        for r in adapter.replacements
        if any(w in r.name for w in words)
    ]
    return found


def _share(part: float, whole: float) -> float:
    return math.sqrt(part / whole) if whole > 0 else 0.0
