"""Changes whose size, or more, is known only once all of them lie in the base."""

from __future__ import annotations

from collections.abc import Sequence

from loratool.adapter import Adapter
from loratool.bind.items import BoundDelta
from loratool.errors import MismatchError, list_some
from loratool.frozen import replace


def join_changes(deltas: Sequence[BoundDelta], adapter: Adapter) -> tuple[BoundDelta, ...]:
    """The bound changes with what follows from all of them together.

    Raises:
        MismatchError: LT-460, some of them are not bound.
    """
    kinds = {s.kind: s.row.joint for s in adapter.specs if s.row.joint is not None}
    found = tuple(deltas)
    for kind, joint in kinds.items():
        assert joint is not None
        names = {s.name for s in adapter.specs if s.kind == kind}
        bound = {d.spec.name: d.spec for d in found if d.spec.kind == kind}
        if missing := names - bound.keys():
            raise MismatchError(
                "LT-460", "what all modules share follows from all of them, and some are left out",
                file=adapter.path, key=list_some(sorted(missing), 3),
                hint="leave nothing out, or save the adapter with save_projection=True",
            )  # fmt: skip
        settings = joint(list(bound.values()))
        found = tuple(_with(d, settings) if d.spec.kind == kind else d for d in found)
    return found


def _with(delta: BoundDelta, settings: object) -> BoundDelta:
    spec = delta.spec
    return replace(delta, spec=replace(spec, settings={**spec.settings, **settings}))  # type: ignore[dict-item]
