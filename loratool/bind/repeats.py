"""A weight that an adapter changes twice, under a fused name and under separate ones.

Files for Z-Image hold both spellings of one change, for programs that read either.  It counts once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from loratool.adapter import DeltaSpec
from loratool.bind.items import BoundDelta, Found
from loratool.bind.place import Context
from loratool.delta.forms import shape_of
from loratool.delta.stacking import cut
from loratool.dtypes import DTYPES
from loratool.errors import MismatchError
from loratool.report.text import plural

_SLACK = 4  # Factors are rounded in each spelling: ΔW is off by a few roundings of their type.
_Span = tuple[int, int]


def without_repeats(found: Sequence[Found], ctx: Context) -> tuple[list[Found], int]:
    """What is left where changes of the same rows are equal, and how many were left out.

    Raises:
        MismatchError: LT-447, they are not equal.
    """
    holders: dict[str, list[Found]] = {}
    for one in found:
        for target in one.targets if one.deltas else ():
            holders.setdefault(target, []).append(one)
    repeated: list[Found] = []
    for target, several in holders.items():
        for one in several if len(several) > 1 else ():
            others = [o for o in several if o is not one and o not in repeated]
            outer = next((o for o in others if _is_inside(one, o, ctx)), None)
            if outer is not None and one not in repeated:
                _check_equal(one, outer, target, ctx)
                repeated.append(one)
    return [one for one in found if one not in repeated], len(repeated)


def _is_inside(inner: Found, outer: Found, ctx: Context) -> bool:
    """True if a change lies within another that has been looked up under another name."""
    is_told = inner.item.is_translated or outer.item.is_translated
    return is_told and all(_around(delta, outer, ctx) is not None for delta in inner.deltas)


def _around(delta: BoundDelta, outer: Found, ctx: Context) -> BoundDelta | None:
    first, stop = _rows_in_target(delta, ctx)
    for other in outer.deltas:
        start, end = _rows_in_target(other, ctx)
        if other.target == delta.target and start <= first and stop <= end:
            return other
    return None


def _rows_in_target(delta: BoundDelta, ctx: Context) -> _Span:
    spans = delta.region.rows or delta.region.cols
    return (spans[0].start, spans[-1].stop) if spans else (0, ctx.shape(delta.target)[0])


def _check_equal(inner: Found, outer: Found, target: str, ctx: Context) -> None:
    from loratool.engine.repeats import norms  # torch: only such files need it

    for delta in inner.deltas:
        around = _around(delta, outer, ctx)
        assert around is not None
        place = _rows_in_target(delta, ctx)
        one, other = _rows(delta, place, ctx), _rows(around, place, ctx)
        words = "kinds of changes that cannot be compared"
        if one is not None and other is not None:
            first, second, difference = norms(one, other)
            if difference <= _tolerance(one, other) * max(first, second):
                continue
            words = f"‖ΔW‖ = {first:.6g} and {second:.6g}, ‖difference‖ = {difference:.6g}"
        raise MismatchError(
            "LT-447", "the adapter changes the same rows twice, and not alike",
            file=ctx.checkpoint.path, key=target, expected="equal changes, or one of them",
            got=f"{inner.item.label} and {outer.item.label}: {words}",
            hint=f"leave one out: --skip '^{inner.item.module}$'",
        )  # fmt: skip


def _rows(delta: BoundDelta, place: _Span, ctx: Context) -> DeltaSpec | None:
    """The rows of a change that lie at a place of its target."""
    start = _rows_in_target(delta, ctx)[0]
    source = delta.region.source_rows or delta.region.source_cols
    shift = (source[0] if source else 0) - start
    first, stop = place[0] + shift, place[1] + shift
    height = shape_of(delta.spec)[0]
    spans = [s for s in ((0, first), (first, stop), (stop, height)) if s[0] < s[1]]
    parts = cut(delta.spec, spans) if len(spans) > 1 else [delta.spec]
    return None if parts is None else parts[spans.index((first, stop))]


def _tolerance(one: DeltaSpec, other: DeltaSpec) -> float:
    types = {source.dtype for spec in (one, other) for source in spec.fields.values()}
    coarsest = min(DTYPES[dtype].precision for dtype in types if DTYPES[dtype].is_float)
    return _SLACK * 2.0 ** (1 - coarsest)


def words_of(repeats: int) -> Iterator[str]:
    """A note, where there were some."""
    if repeats:
        yield f"{plural(repeats, 'change')} under two names in the file, and equal: counted once"
