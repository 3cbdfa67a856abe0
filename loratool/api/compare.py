"""`compare`: how alike adapters are."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.adapter import Adapter, DeltaSpec
from loratool.api.access import access_of, check_files
from loratool.api.common import Limits
from loratool.api.compare_run import run_compare
from loratool.api.freeing import dependent
from loratool.api.page import with_page
from loratool.dtypes import DTYPES
from loratool.errors import MismatchError, UsageError
from loratool.frozen import replace
from loratool.ops.additive import in_one_order
from loratool.ops.compare import (
    Aligned,
    align,
    find_differences,
    find_replacements,
    has_same_factors,
)
from loratool.ops.consent import agree_to_read
from loratool.ops.inputs import open_base, open_one
from loratool.ops.sizes import with_sizes
from loratool.ops.turns import Turns
from loratool.options.calls import takes
from loratool.options.groups import Read
from loratool.options.looking import Compare
from loratool.report.compare import ComparedModule, ComparedReplacement, CompareReport
from loratool.report.families import family_of, place_of
from loratool.store.new_file import write_new_file

if TYPE_CHECKING:
    from loratool.engine.comparison import PairResult

_SHOWN_PHI = 16  # directions per module in the report
_SAME = 16.0
"""‖ΔW₁ − ΔW₂‖ below so many roundings of the storage type is no difference: another gauge of the
same product, B·R and R⁻¹·A, is stored with a rounding per element times the condition of R."""
_MOST_ROUNDING = 0.01
_COMPUTED = 1e-6  # what ‖ΔW − ΔW‖ may come out as, of factors in float64


@takes(Compare)
def compare(asked: Compare) -> CompareReport:
    """Compare what adapters change: two in detail, more as a matrix of cosines.

    Everything is computed from the factors in float64; ΔW is never formed.  Only signs and the
    overlap of the largest elements need elements: whole rows, sampled evenly in large modules.
    With the base, W' - W of changes that depend on it (DoRA, OFT, PiSSA) takes the factors' place.

    Raises:
        LoratoolError: see ``docs/errors.md``.

    Example:
        >>> lt.compare(["style", "style"]).verdict
        'equal'
    """
    started = time.monotonic()
    if len(asked.adapters) < 2:
        raise UsageError(
            "LT-284", "compare takes two adapters or more", got=" ".join(map(str, asked.adapters)),
            hint=shlex.join(["loratool", "inspect", *map(str, asked.adapters)]),
        )  # fmt: skip
    check_files(asked.csv, asked.plot, asked.html)
    access = access_of(asked, in_place=True)
    read = asked.take(Read)
    found = [open_one(str(text), read=read, access=access) for text in asked.adapters]
    opened = in_one_order([adapter for _, adapter in found])
    limits, base = Limits.of(asked), None
    if asked.base is not None:
        base = open_base(str(asked.base), opened, access)
        opened = [with_sizes(one, base.checkpoint, "compared") for one in opened]
        if not any(dependent(one) for one in opened):
            base = None
    labels = _labels([resolved.label for resolved, _ in found])
    as_read, opened = opened, _in_one_naming(opened, limits)
    aligned = align(opened, has_base=base is not None)
    from loratool.engine.reads import factor_ranges

    agree_to_read((r for a in opened for r in factor_ranges(a.specs)), yes=asked.yes)
    turns = Turns(asked.progress, asked.on_work)
    seen, results = run_compare(opened, aligned, limits, base, turns)
    told = {"adapters": tuple(labels), "only": seen.only, "shared": len(seen.shared)}
    if len(opened) == 2:
        report = _compare_two(opened, seen, results, aligned, told)
        report = replace(report, differences=tuple(find_differences(*as_read)))
    else:
        report = _compare_many(len(opened), results, told)
    notes = (note for new, old in zip(opened, as_read, strict=True)
             for note in new.notes if note not in old.notes)  # fmt: skip
    seconds = time.monotonic() - started
    report = replace(report, seconds=seconds, warnings=_warnings(seen), notes=tuple(notes))
    return _with_files(with_page(report, asked.html), asked)


def _in_one_naming(adapters: Sequence[Adapter], limits: Limits) -> list[Adapter]:
    """Files of several programs with the names of one, as far as these are known."""
    from loratool.api.translating import alike

    try:
        return alike(adapters, limits)
    except MismatchError:
        return list(adapters)


def _compare_two(
    adapters: Sequence[Adapter], aligned: Aligned, results: Sequence[Any], stored: Aligned,
    told: Mapping[str, Any],
) -> CompareReport:  # fmt: skip
    from loratool.engine.comparison import MeanTable

    every = list(zip(aligned.groups.items(), results, strict=True))
    pairs = [(name, specs, found) for (name, specs), found in every if len(specs) == 2]
    alone = [(number, square) for (_, specs), found in every if len(specs) == 1
             for (number, _), square in found.items()]  # fmt: skip
    both = [found for *_, found in pairs]
    squares = ([f.square_one for f in both], [f.square_two for f in both])
    for number, square in alone:
        squares[number].append(square)
    norms = tuple(math.sqrt(math.fsum(s)) for s in squares)
    cosine = _cosine(math.fsum(f.inner for f in both), norms[0] * norms[1])
    difference = math.fsum([*(f.difference for f in both), *(square for _, square in alone)])
    apart = _ratio(math.sqrt(difference), max(norms))
    mean_A, mean_B = MeanTable(), MeanTable()
    for found in both:
        mean_A.add(found.phi_A)
        mean_B.add(found.phi_B)
    replaced = find_replacements(*adapters)
    limit = min(_MOST_ROUNDING, _SAME * max(_half_step(a) for a in adapters))
    modules = tuple(_module(name, (_rank(specs[0]), _rank(specs[1])), found)
                    for name, specs, found in pairs)  # fmt: skip
    return CompareReport(
        **told,
        norms=norms,
        matrix=((1.0, cosine), (cosine, 1.0)),
        verdict=_verdict(apart, limit, replaced, stored),
        relative_difference=apart,
        modules=modules,
        replacements=tuple(replaced),
        phi_A=tuple(map(tuple, mean_A.table())),
        phi_B=tuple(map(tuple, mean_B.table())),
        sign_conflict=_ratio(sum(f.signs.opposite for f in both), sum(f.signs.both for f in both)),
        sampled=sum(m.sampled for m in modules),
        elements=sum(m.elements for m in modules),
    )


def _verdict(
    apart: float, limit: float, replaced: Sequence[ComparedReplacement], stored: Aligned
) -> str:
    """What two adapters are to each other.

    Args:
        apart: ‖ΔW₁ − ΔW₂‖ over the larger norm.
        limit: what rounding explains of it.
        replaced: tensors that take the base's place.
        stored: the changes as the files have them.
    """
    is_close = math.isnan(apart) or apart <= max(limit, _COMPUTED)
    if not is_close or any(r.where != "both" or r.identical is False for r in replaced):
        return "different"
    # Only now are bytes compared, which takes reading all factors once more.
    found = "equal" if has_same_factors(stored) else "same change" if apart <= limit else ""
    if found and any(r.identical is None for r in replaced):
        return "undecided"
    return found or "different"


def _module(name: str, ranks: tuple[int, int], found: PairResult) -> ComparedModule:
    one, two = math.sqrt(found.square_one), math.sqrt(found.square_two)
    out, inner = found.sides
    signs = found.signs
    phi_A, phi_B = (
        ([] if t is None else t.tolist()) for t in (found.phi_A, found.phi_B)
    )  # fmt: skip
    rank = min(len(phi_A), len(phi_A[0])) if phi_A and phi_A[0] else 0
    larger = max(len(phi_A), len(phi_A[0])) if rank else 0
    return ComparedModule(
        name=name,
        family=family_of(name),
        layer=place_of(name).layer,
        shape=found.sides,
        ranks=ranks,
        norms=(one, two),
        cosine=_cosine(found.inner, one * two),
        norm_ratio=_ratio(two, one),
        relative_difference=_ratio(math.sqrt(found.difference), max(one, two)),
        similarity_A=phi_A[-1][-1] if rank else math.nan,
        similarity_B=phi_B[-1][-1] if rank else math.nan,
        random_A=min(1.0, larger / inner) if rank else math.nan,
        random_B=min(1.0, larger / out) if rank else math.nan,
        angles_A=_spread(found.angles_A.tolist()),
        angles_B=_spread(found.angles_B.tolist()),
        sign_conflict=_ratio(signs.opposite, signs.both),
        top_overlap=_ratio(signs.shared_top, signs.top),
        sampled=signs.seen,
        elements=signs.total,
        phi_A=tuple(tuple(row[:_SHOWN_PHI]) for row in phi_A[:_SHOWN_PHI]),
        phi_B=tuple(tuple(row[:_SHOWN_PHI]) for row in phi_B[:_SHOWN_PHI]),
    )


def _rank(spec: DeltaSpec) -> int:
    """R as stated; of W' - W, which has none, the largest that it can have."""
    return spec.rank or (spec.product_rank if spec.has_factors and spec.is_matrix else 0)


def _compare_many(count: int, results: Sequence[Any], told: Mapping[str, Any]) -> CompareReport:
    sums: dict[tuple[int, int], list[float]] = {
        (s, t): [] for s in range(count) for t in range(s, count)
    }
    for found in results:
        for pair, value in found.items():
            sums[pair].append(value)
    total = {pair: math.fsum(values) for pair, values in sums.items()}
    norms = tuple(math.sqrt(total[i, i]) for i in range(count))

    def cosine(s: int, t: int) -> float:
        if s == t:
            return 1.0 if norms[s] > 0 else math.nan
        return _cosine(total[min(s, t), max(s, t)], norms[s] * norms[t])

    matrix = tuple(tuple(cosine(s, t) for t in range(count)) for s in range(count))
    return CompareReport(**told, norms=norms, matrix=matrix)


def _with_files(report: CompareReport, asked: Compare) -> CompareReport:
    from loratool.report.compare_chart import draw_comparison
    from loratool.report.csvfile import comparison_table

    files = [] if asked.html is None else [str(asked.html)]
    if asked.csv is not None:
        files.append(write_new_file(Path(asked.csv), comparison_table(report)))
    if asked.plot is not None:
        picture = draw_comparison(report, Path(asked.plot).suffix)
        files.append(write_new_file(Path(asked.plot), picture))
    return replace(report, files=tuple(files))


def _labels(names: Sequence[str]) -> list[str]:
    """Short names; equal ones are numbered."""
    found: list[str] = []
    for name in names:
        number = sum(f == name or f.startswith(f"{name}#") for f in found)
        found.append(f"{name}#{number + 1}" if number else name)
    return found


def _half_step(adapter: Adapter) -> float:
    """Largest relative rounding of the factors' storage types, 2⁻ᵖ."""
    types = {f.dtype for s in adapter.specs for f in s.fields.values()}
    return max((2.0 ** -DTYPES[t].precision for t in types), default=0.0)


def _spread(angles: Sequence[float]) -> tuple[float, ...]:
    """Smallest, median and largest, in degrees."""
    if not angles:
        return ()
    ordered = [math.degrees(a) for a in angles]
    return ordered[0], ordered[len(ordered) // 2], ordered[-1]


def _warnings(aligned: Aligned) -> tuple[str, ...]:
    if aligned.shared:
        return ()
    return ("the adapters have no module in common: different names, or different bases",)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan


def _cosine(inner: float, norms: float) -> float:
    """In [-1, 1]: the last bit of a sum may lie outside."""
    return max(-1.0, min(1.0, inner / norms)) if norms > 0 else math.nan
