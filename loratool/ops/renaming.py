"""An adapter under the names that another dialect's programs know."""

from __future__ import annotations

import re
from collections.abc import Sequence

from loratool.adapter import Adapter, DeltaSpec, Replacement
from loratool.archs.families import places, split_component
from loratool.delta import stacking
from loratool.dialects.base import Dialect
from loratool.dialects.slots import is_text, slot_of
from loratool.dialects.table import Table
from loratool.errors import MismatchError, list_some
from loratool.frozen import replace
from loratool.ops.locating import Located, locate, naming_in, require_family
from loratool.ops.naming import Moved, rename
from loratool.report.text import plural


def in_dialect(adapter: Adapter, row: Dialect, remake: stacking.Remake) -> Adapter:
    """The adapter under the names that a dialect's programs know.

    Args:
        adapter: every change of which is of a kind that the dialect holds.
        row: of a dialect that is a table, and has a naming.
        remake: of `loratool.delta.stacking.join`.

    Raises:
        MismatchError: LT-411, of another family; LT-404, names that no family has and that cannot
            be told from flat ones; LT-494, LT-417 of `rename`.
    """
    table = row.table
    assert table is not None
    require_family(adapter, table.of, row.title)
    located = locate(adapter, table.naming)
    unknown = [one.spec.name for one in located if one.place is None]
    if unknown and adapter.is_flat and not table.is_flat:
        raise MismatchError(
            "LT-404", f"no whole name is known of {plural(len(unknown), 'flat module')}",
            file=adapter.path, key=list_some(unknown, 3),
            hint="give the base model, --base BASE: its tensors name them",
        )  # fmt: skip
    try:
        moved = renamed(located, table, remake)
    except MismatchError as problem:
        raise problem.of(adapter.path) from None
    specs, family = tuple(one.spec for one in moved), _main(moved)
    replaced = tuple(_replaced(r, table, family) for r in adapter.replacements)
    is_same = adapter.is_flat == table.is_flat and adapter.dialect == row.name
    if is_same and (specs, replaced) == (adapter.specs, adapter.replacements):
        return adapter
    return replace(adapter, specs=specs, replacements=replaced, is_flat=table.is_flat, key_order=())


def renamed(located: Sequence[Located], table: Table, remake: stacking.Remake) -> list[Moved]:
    """Changes behind the components that a dialect has for them.

    Args:
        located: of `locate`, those of a whole adapter.
        table: of the dialect.
        remake: of `loratool.delta.stacking.join`.

    Raises:
        MismatchError: of `rename`.
    """
    moved = rename(located, lambda family: naming_in(family, table.naming), remake)
    family = _main(moved)
    is_named = any(one.spec.module.startswith("transformer.") for one in located)
    usual = "transformer" if is_named else "unet"
    if any(m.family and not m.component for m in moved):  # no name says what part it is of
        moved = [m if m.component else replace(m, component="unet") for m in moved]
    return [replace(m, spec=_under(m, family, table, usual)) for m in moved]


def _main(moved: Sequence[Moved]) -> str:
    """The family of the model itself, "" = unknown: that of most modules.

    Where several families have a module, any of them may stand for it.
    """
    found = [m.family for m in moved if m.family and not is_text(m.component)]
    return max(found, key=found.count, default="")


def addressed(one: Located, table: Table) -> DeltaSpec:
    """A change with the parameter that a dialect's names have for it; its module may be another."""
    spec, place = one.spec, one.place
    if place is not None and place.is_tensor:
        names = place.names(place.called(naming_in(place.family, table.naming), 0, 0))
        module, _, parameter = names[0].rpartition(".")
        spec = replace(spec, module=module, parameter=parameter)
    return table.addressed(spec)


def _under(moved: Moved, family: str, table: Table, usual: str) -> DeltaSpec:
    """The change behind the component that the dialect has for it."""
    slot = slot_of(table, moved.component, moved.family, family, usual)
    spec = table.addressed(moved.spec)
    module = spec.module.replace(".", "_") if table.is_flat else spec.module
    return replace(spec, module=".".join(filter(None, (slot, module))))


def _replaced(one: Replacement, table: Table, main: str) -> Replacement:
    """A whole tensor under the name that the dialect's programs know.

    Args:
        one: of the adapter.
        table: of the dialect.
        main: family of the adapter's model, "" = unknown.
    """
    component, name = split_component(one.name)
    module, _, parameter = name.rpartition(".")
    rows, wide = (*one.source.shape, 0, 0)[:2]
    found = [
        (p, p.called(naming_in(p.family, table.naming), rows, wide))
        for p in places(component, module, parameter, main or None)
    ]
    if len({(p.tensors(way), p.is_swapped(way, rows, wide)) for p, way in found}) != 1:
        return one
    place, way = found[0]
    if place.is_part or len(names := place.tensors(way)) != 1 or place.row.swap == "axes":
        raise MismatchError(
            "LT-494", "a replaced tensor has no form under the other names", key=one.name,
            got="part of a tensor, several, or other axes",
            hint=f"leave it out: --skip ^{re.escape(one.name.rpartition('.')[0])}$",
        )  # fmt: skip
    source = one.source
    if place.is_swapped(way, rows, wide):
        source = stacking.take_rows(source, [(rows // 2, rows), (0, rows // 2)])
    module, _, parameter = names[0].rpartition(".")
    module = module.replace(".", "_") if table.is_flat else module
    slot = slot_of(table, component, place.family, main)
    return replace(one, name=".".join(filter(None, (slot, module, parameter))), source=source)
