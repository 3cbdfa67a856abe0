"""Tensors that adapters put in the base's place, where the adapters are added up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from loratool.adapter import Adapter, Replacement, TensorRef
from loratool.errors import MismatchError, list_some
from loratool.frozen import Frozen
from loratool.ops.weights import Weight
from loratool.report.text import plural
from loratool.store.reader import are_of_one_file, have_same_bytes
from loratool.store.remote_spans import Range

_ONE = 1e-12
WITH_BASE = {
    "subtracted": "the base settles it: --base BASE",
    "merged": "the base settles it: --base BASE --into adapter",
    "rescaled": "the base settles it: --base BASE",
}
"""Past participle of what is done -> what to do where it takes the base."""


class Mixed(Frozen):
    """Tensors that take the same place, as one.

    Attributes:
        found: each with its weight; the weights add up to 1 if there is no base.
        base: what they replace: the result is W + Σ weight·(new - W).
    """

    found: tuple[tuple[Replacement, float], ...]
    base: TensorRef | None = None

    @property
    def name(self) -> str:
        """Of the tensor."""
        return self.found[0][0].name


class Replaced(Frozen):
    """What becomes of tensors that adapters put in the base's place.

    Attributes:
        kept: carried over as they are.
        mixed: with new values.
        gone: names of those that are the base's own again.
    """

    kept: tuple[Replacement, ...]
    mixed: tuple[Mixed, ...]
    gone: tuple[str, ...]

    def notes(self) -> list[str]:
        """One sentence each."""
        said = (
            ("is", "are", "kept", [r.name for r in self.kept]),
            ("is", "are", "the base's own again", self.gone),
            ("is", "are", "averaged", [m.name for m in self.mixed if m.base is None]),
            ("becomes", "become", "W + Σ weight·(new - W)",
             [m.name for m in self.mixed if m.base is not None]),
        )  # fmt: skip
        return [
            f"{plural(len(names), f'replaced tensor {one}', f'replaced tensors {many}')} {what}: "
            f"{list_some(names, 3)}"
            for one, many, what, names in said if names
        ]  # fmt: skip


def sum_replaced(
    adapters: Sequence[tuple[Adapter, Weight]], verb: str, base: Mapping[str, TensorRef]
) -> Replaced:
    """Which of the replaced tensors the result has.

    W + Σ c·(T - W) needs no base where the weights of those that replace a tensor sum up to 1: it
    is Σ c·T.  Where they sum up to 0 and hold the same bytes, W stays.  When adapters are merged
    without it and every one of them has the same bytes, those are taken.  Anything else takes the
    base.

    Raises:
        MismatchError: LT-464, the base is needed.
    """
    groups: dict[tuple[str, bool], list[tuple[Replacement, float]]] = {}
    for adapter, weight in adapters:
        for one in adapter.replacements:
            groups.setdefault((one.name, one.rows is None), []).append((one, weight.of(one.name)))
    kept, mixed, gone, conflicts = [], [], [], []
    for (name, _), found in groups.items():
        first, total = found[0][0], sum(weight for _, weight in found)
        is_same = all(one.rows == first.rows for one, _ in found) and (
            len(found) == 1 or have_same_bytes([one.source for one, _ in found])
        )
        has_base = name in base and all(_lies_on(one, base[name]) for one, _ in found)
        is_agreed = verb == "merged" and len(found) == len(adapters) > 1 and not has_base
        if is_same and (is_agreed or abs(total - 1) <= _ONE):
            kept.append(first)
        elif abs(total - 1) <= _ONE and all(
            (one.rows, one.source.shape) == (first.rows, first.source.shape) for one, _ in found
        ):
            mixed.append(Mixed(tuple(found)))
        elif is_same and total == 0:
            gone.append(name)
        elif has_base:
            mixed.append(Mixed(tuple(found), base[name]))
        else:
            conflicts.append(name)
    if conflicts:
        raise MismatchError(
            "LT-464", f"replaced tensors cannot be {verb}: their change depends on the base",
            file=adapters[0][0].path, key=list_some(conflicts),
            hint=WITH_BASE[verb],
        )  # fmt: skip
    return Replaced(tuple(kept), tuple(mixed), tuple(gone))


def _lies_on(one: Replacement, base: TensorRef) -> bool:
    """A replacement that changes no sizes."""
    if one.rows is None:
        return one.source.shape == base.shape
    return one.source.shape[1:] == base.shape[1:] and max(one.rows, default=0) < base.shape[0]


def compared_ranges(adapters: Sequence[Adapter]) -> Iterator[Range]:
    """Replaced tensors that several adapters have: planning a sum compares their bytes."""
    found: dict[str, list[TensorRef]] = {}
    for adapter in adapters:
        for one in adapter.replacements:
            if isinstance(one.source, TensorRef):
                found.setdefault(one.name, []).append(one.source)
    for refs in found.values():
        if len(refs) > 1 and not are_of_one_file(refs):
            yield from ((ref.file, ref.start, ref.nbytes) for ref in refs)
