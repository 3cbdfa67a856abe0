"""Write what a table describes: deltas → tensors, each with its alpha."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from loratool.adapter import (
    Adapter,
    AdapterFiles,
    DeltaSpec,
    Source,
    TensorData,
    TensorRef,
)
from loratool.archs.families import trained_as
from loratool.delta.forms import matrix_shape, scaled_source, side_sizes, with_scaled_source
from loratool.dialects.arranged import as_stored
from loratool.dialects.factors import with_axes
from loratool.dialects.table import Table
from loratool.dialects.table_read import read_tensors
from loratool.dtypes import DTYPES
from loratool.errors import MismatchError, list_some
from loratool.frozen import replace
from loratool.kind import GROWS
from loratool.options.groups import Read
from loratool.store.reader import read_bytes

_OTHER_SIGN = bytes(byte ^ 0x80 for byte in range(256))


def write_table(
    table: Table,
    dialect: str,
    title: str,
    adapter: Adapter,
    *,
    base_config: Mapping[str, Any] | None = None,
    base_tensors: Iterable[str] = (),
) -> AdapterFiles:
    """The file of an adapter: its own tensors where it is unchanged, else all of them anew.

    Args:
        table: of the dialect.
        dialect: its name.
        title: its title, for messages.
        adapter: what to write.
        base_config: of no use here.
        base_tensors: likewise.

    Raises:
        MismatchError: LT-411, the dialect cannot hold it.
    """
    if dialect == adapter.dialect and (old := _unchanged(table, adapter)) is not None:
        return AdapterFiles(old, dict(adapter.metadata), "")
    _check(table, adapter, title)
    adapter = folded(table, adapter, own=dialect == adapter.dialect)
    tensors: dict[str, Source] = {}
    for name, source in _changes(table, adapter, own=dialect == adapter.dialect):
        if not name or name in tensors:
            raise MismatchError(
                "LT-411", f"{title} cannot hold this adapter: "
                + ("two modules have one name" if name else "a bias that scales by itself"),
                file=adapter.path, key=name or source.name,
                hint="--to kohya names the parts of a pipeline apart" if name else None,
            )  # fmt: skip
        tensors[name] = source
    tensors |= {ref.name: ref for ref in adapter.carried if table.is_passed(ref.name)}
    # The order in which the safetensors library lays tensors out: wide types first, then by name.
    ordered = sorted(tensors.items(), key=lambda item: (-DTYPES[item[1].dtype].bits, item[0]))
    return AdapterFiles(tuple(ordered), _metadata(table, adapter), "")


def folded(table: Table, adapter: Adapter, *, own: bool) -> Adapter:
    """With every scaling in a factor, for files that do not say it: most programs take it for 1.

    Args:
        table: of the dialect.
        adapter: to be written.
        own: it was read in this dialect.
    """
    if table.keeps_alphas(adapter.key_order if own else ()) or _is_stated(table, adapter):
        return adapter
    return replace(adapter, specs=tuple(s if s.scaling == 1 else _fold(s) for s in adapter.specs))


def _is_stated(table: Table, adapter: Adapter) -> bool:
    """Do the metadata say so already?"""
    ranked = [s for s in adapter.specs if s.rank]
    if table.header is None:
        return all(s.scaling == 1 for s in ranked)
    stated = table.header.read(adapter.metadata, [s.module for s in ranked])
    said = [(s.scaling, stated(s.module, s.rank)) for s in ranked]
    return all(factor == (1 if one is None else one.factor) for factor, one in said)


def _fold(spec: DeltaSpec) -> DeltaSpec:
    from loratool.delta.scaling import folded

    source = folded(scaled_source(spec), spec.scaling)
    alpha = float(spec.rank) if spec.rank else None
    return replace(with_scaled_source(spec, source), alpha=alpha, scaling=1.0)


def _changes(table: Table, adapter: Adapter, *, own: bool) -> Iterator[tuple[str, Source]]:
    """Name and tensor of everything that changes the base; "" for what has no name.

    Args:
        table: of the dialect.
        adapter: what to write.
        own: it was read in this dialect: it keeps its spellings.
    """
    names = adapter.key_order if own else ()
    used, has_alphas = table.suffixes_in(names), table.keeps_alphas(names)
    dtype = _alpha_dtype(adapter)
    norms = {s.module for s in adapter.specs if s.parameter == "weight" and not s.is_matrix}
    gains = {s.module: s.scaling for s in adapter.specs if s.rank}
    for spec in adapter.specs:
        stem = table.stem_of(spec.module, is_flat=adapter.is_flat)
        gain = gains.get(spec.module)
        if spec.scaling < 0 and spec.rank:  # loaders halve a scale until it fits: never below 0
            spec = turned(spec)
        keys = table.keys_of(spec, stem, used, is_norm=spec.module in norms, gain=gain)
        yield from ((name, with_axes(spec, role, table.is_open(name))) for role, name in keys)
        if not keys:
            yield "", next(iter(spec.fields.values()))
        if has_alphas and (spec.rank or (spec.is_matrix and spec.alpha is not None)):
            yield f"{stem}.{table.alpha}", _alpha(spec, dtype)
        if table.grows and spec.settings.get(GROWS):
            yield f"{stem}.{table.grows}", _shape(spec)
    for new in adapter.replacements:
        yield table.key_of_set(new.name, is_flat=adapter.is_flat) or "", new.source


def turned(spec: DeltaSpec) -> DeltaSpec:
    """The same change with the sign of its scaling in a factor: exact, one bit per number."""
    source = scaled_source(spec)
    size = DTYPES[source.dtype].bits // 8
    data = bytearray(read_bytes(source))
    data[size - 1 :: size] = data[size - 1 :: size].translate(_OTHER_SIGN)
    factor = TensorData(f"{spec.name} -", source.dtype, source.shape, bytes(data))
    fields = {role: factor if one is source else one for role, one in spec.fields.items()}
    alpha = None if spec.alpha is None else -spec.alpha
    return replace(spec, fields=fields, alpha=alpha, scaling=-spec.scaling)


def alpha_of(spec: DeltaSpec) -> float:
    """The alpha whose α/r is the spec's scaling; off by 2⁻⁵² of it at most.

    That of a change without a rank says nothing, and stays.
    """
    alpha = spec.alpha
    if not spec.rank:
        return alpha or 0.0
    is_kept = alpha is not None and alpha / spec.rank == spec.scaling
    return float(alpha) if is_kept and alpha is not None else spec.scaling * spec.rank


def _unchanged(table: Table, adapter: Adapter) -> tuple[tuple[str, Source], ...] | None:
    """The file's tensors in its order if reading them again gives the same adapter."""
    refs: dict[str, TensorRef] = {ref.name: ref for ref in adapter.carried}
    for spec in adapter.specs:
        for source in spec.fields.values():
            if not isinstance(source, TensorRef):
                return None
            refs[source.name] = source
    for new in adapter.replacements:
        if not isinstance(new.source, TensorRef):
            return None
        refs[new.source.name] = new.source
    if set(refs) != set(adapter.key_order):
        return None
    ordered = [as_stored(refs[name]) for name in adapter.key_order]
    # Only the default reading: the file cannot say what the user said when it was opened.
    again = read_tensors(table, ordered, Read(), adapter.metadata)
    if (again.specs, again.replacements) != (adapter.specs, adapter.replacements):
        return None
    return tuple(zip(adapter.key_order, ordered, strict=True))


def _check(table: Table, adapter: Adapter, title: str) -> None:
    found = {s.name: reason for s in adapter.specs if (reason := table.obstacle(s))}
    found |= {
        r.name: "a replaced tensor" for r in adapter.replacements
        if r.rows is not None or table.key_of_set(r.name, is_flat=adapter.is_flat) is None
    }  # fmt: skip
    reasons = [*found.values(), *(["replicated layers"] if adapter.layer_order else [])]
    if reasons:
        raise MismatchError(
            "LT-411", f"{title} cannot hold this adapter: {reasons[0]}", file=adapter.path,
            key=list_some(found, 3) or "layer_replication", got=list_some(set(reasons), 3),
        )  # fmt: skip


def _alpha(spec: DeltaSpec, dtype: str) -> TensorData:
    """A tensor of one number, in a type that holds it exactly where there is one."""
    value = alpha_of(spec)
    forms = {"F16": "<e", "F32": "<f", "F64": "<d"}
    for name in dict.fromkeys((dtype, "F32", "F64")):
        if name in forms and (data := _packed(forms[name], value)) is not None:
            return TensorData(f"{spec.name} alpha", name, (), data)
    return TensorData(f"{spec.name} alpha", "F64", (), struct.pack("<d", value))


def _shape(spec: DeltaSpec) -> TensorData:
    """The shape of a change as a tensor of whole numbers."""
    out, inner = side_sizes(spec)
    data = struct.pack(f"<{1 + len(inner)}q", out, *inner)
    return TensorData(f"{spec.name} shape", "I64", (1 + len(inner),), data)


def _packed(form: str, value: float) -> bytes | None:
    try:
        data = struct.pack(form, value)
    except OverflowError:
        return None
    return data if struct.unpack(form, data)[0] == value else None


def _alpha_dtype(adapter: Adapter) -> str:
    """That of the file's own alphas."""
    return next((ref.dtype for ref in adapter.carried if ref.numel == 1), "F32")


def _metadata(table: Table, adapter: Adapter) -> dict[str, str]:
    """What still holds of the metadata: not what speaks of the very tensors.

    Where it does not say what the file is for, the names do: the web UI hides a file whose metadata
    are not those of the model that it has loaded (``detect_version`` of its extension, 1.10.1).
    """
    stale = re.compile(table.stale) if table.stale else None
    kept = {
        key: value for key, value in adapter.metadata.items()
        if key != "loratool" and (stale is None or not stale.fullmatch(key))
    }  # fmt: skip
    if table.header is not None:
        kept = table.header.write(kept, adapter.specs)
    ranked = [s for s in adapter.specs if s.rank]
    values: tuple[set[float], ...] = ({s.rank for s in ranked}, {alpha_of(s) for s in ranked})
    for key, found in zip(table.ranks, values, strict=True):
        if key:
            kept[key] = f"{next(iter(found)):g}" if len(found) == 1 else "Dynamic"
    if table.model and table.model not in kept:
        shapes = {s.module: matrix_shape(s) for s in adapter.specs if s.is_matrix}
        kept |= {table.model: name} if (name := trained_as(shapes)) else {}
    return kept
