"""Which modules of adapters belong together, and what else differs (no torch)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loratool.adapter import Adapter, DeltaSpec, Source, TensorRef
from loratool.delta.forms import matrix_shape, shape_of
from loratool.dialects.stated import QUIET
from loratool.engine.reads import factor_ranges
from loratool.errors import MismatchError
from loratool.frozen import Frozen, replace
from loratool.location import RemoteFile
from loratool.ops.additive import FREED, require_additive, require_factors
from loratool.plan import DeltaPart, Plan, module_step
from loratool.report.compare import ComparedReplacement, Difference
from loratool.report.text import plural
from loratool.store.reader import FileReader, are_of_one_file, have_same_bytes

_LONG = 120


class Aligned(Frozen):
    """The modules of all adapters.

    Attributes:
        groups: module name -> position of the adapter -> spec.
        shared: names that all adapters have.
        only: per adapter, names that no other one has.
    """

    groups: Mapping[str, Mapping[int, DeltaSpec]]
    shared: tuple[str, ...]
    only: tuple[tuple[str, ...], ...]


def align(adapters: Sequence[Adapter], *, has_base: bool = False) -> Aligned:
    """Group deltas by in-memory name.

    Args:
        adapters: with a base of known sizes.
        has_base: what depends on it is computed with it.

    Raises:
        MismatchError: LT-460, LT-461 no matrix of their own; LT-469, one module has different
            shapes.
    """
    groups: dict[str, dict[int, DeltaSpec]] = {}
    for number, adapter in enumerate(adapters):
        if not has_base:
            require_additive(adapter, "compared", hint=FREED)
        require_factors(adapter, "compared")
        for spec in adapter.specs:
            groups.setdefault(spec.name, {})[number] = spec
    for name, found in groups.items():
        forms = {number: _form(spec) for number, spec in found.items()}
        if len(set(forms.values())) > 1:
            first, *rest = forms.values()
            raise MismatchError(
                "LT-469", "one module has different shapes: adapters of different bases", key=name,
                expected=first, got=next(f for f in rest if f != first),
            )  # fmt: skip
    return aligned_of(groups, len(adapters))


def aligned_of(groups: Mapping[str, Mapping[int, DeltaSpec]], count: int) -> Aligned:
    """Modules of so many adapters: which of them all have, and which only one."""
    return Aligned(
        groups,
        tuple(n for n, found in groups.items() if len(found) == count),
        tuple(
            tuple(n for n, found in groups.items() if set(found) == {i}) for i in range(count)
        ),
    )  # fmt: skip


def plan_compare(aligned: Aligned, *, in_detail: bool) -> Plan:
    """One step per module: two adapters in detail where both have it, else inner products."""
    steps = []
    for specs in aligned.groups.values():
        op = "compare_modules" if in_detail and len(specs) == 2 else "gram"
        parts = tuple(DeltaPart(spec, 1.0, adapter=n) for n, spec in specs.items())
        steps.append(replace(module_step(op, list(specs.values())), parts=parts))
    return Plan("compare", tuple(steps))


def _form(spec: DeltaSpec) -> str:
    if not spec.is_matrix:
        return f"bias {shape_of(spec)[0]}"
    out, inner = matrix_shape(spec)
    return f"{out}×{inner}" + (f", {plural(spec.experts, 'expert')}" if spec.experts else "")


def find_differences(one: Adapter, two: Adapter) -> list[Difference]:
    """Configuration keys, dialects and storage types that are not the same."""
    rows = {
        "dialect": (one.dialect, two.dialect),
        "type": (_types(one), _types(two)),
        "modules": (len(one.specs), len(two.specs)),
    }
    found = [Difference(k, str(a), str(b)) for k, (a, b) in rows.items() if a != b]
    for key in sorted({*one.config, *two.config} - QUIET):
        first, second = (_plain(a.config.get(key)) for a in (one, two))
        if first != second:
            found.append(Difference(key, first, second))
    return found


def find_replacements(one: Adapter, two: Adapter) -> list[ComparedReplacement]:
    """Replaced tensors of both, compared byte for byte where they are on this machine."""
    mine = {(r.name, r.rows): r for r in one.replacements}
    theirs = {(r.name, r.rows): r for r in two.replacements}
    found = [
        ComparedReplacement(key[0], "both", _are_same(mine[key].source, theirs[key].source))
        for key in mine if key in theirs
    ]  # fmt: skip
    found += [ComparedReplacement(key[0], "first") for key in mine if key not in theirs]
    found += [ComparedReplacement(key[0], "second") for key in theirs if key not in mine]
    return found


def _are_same(one: Source, two: Source) -> bool | None:
    """None if it would take reading from far: these tensors can be as large as a model."""
    if (one.dtype, one.shape) != (two.dtype, two.shape):
        return False
    sources = [s for s in (one, two) if isinstance(s, TensorRef)]
    if not any(isinstance(s.file, RemoteFile) for s in sources) or are_of_one_file(sources):
        return have_same_bytes([one, two])
    return None


def has_same_factors(aligned: Aligned) -> bool:
    """True if all factors have equal bytes and every scaling is the same."""
    pairs: list[tuple[Source, Source]] = []
    for found in aligned.groups.values():
        if len(found) < len(aligned.only):
            return False
        first, *others = found.values()
        for other in others:
            if other.scaling != first.scaling or set(other.fields) != set(first.fields):
                return False
            pairs += [(first.fields[role], other.fields[role]) for role in first.fields]
    with FileReader() as reader:
        reader.expect(factor_ranges(s for found in aligned.groups.values() for s in found.values()))
        return all(have_same_bytes(pair, reader) for pair in pairs)


def _types(adapter: Adapter) -> str:
    return " + ".join(sorted({f.dtype for s in adapter.specs for f in s.fields.values()})) or "none"


def _plain(value: Any) -> str:
    """A configuration value as text; nothing, null, false and empty are one."""
    if value in (None, False, [], {}, ""):
        return "-"
    if isinstance(value, list) and all(isinstance(v, str) for v in value):
        value = sorted(value)
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= _LONG else text[: _LONG - 1] + "…"
