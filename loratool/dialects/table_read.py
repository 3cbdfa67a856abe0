"""Read what a table describes: tensors → deltas, each with its alpha."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from loratool import kinds
from loratool.adapter import MAX_ALPHA, Adapter, DeltaSpec, Replacement, TensorRef
from loratool.delta.forms import side_sizes
from loratool.dialects.arranged import arranged
from loratool.dialects.candidate import Candidate
from loratool.dialects.factors import check_float, product_spec, refuse_shape
from loratool.dialects.fields import Field, Stated
from loratool.dialects.table import ALGORITHMS, Table
from loratool.errors import BadFileError, MismatchError, list_some
from loratool.frozen import Struct, field, replace
from loratool.kind import GROWS
from loratool.options.groups import Read
from loratool.report.text import plural
from loratool.store.reader import FileReader, read_bytes

SET = "set"
"""Origin of tensors that take the base's place in a dialect that says so of each."""
_SCALARS = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i", "I16": "<h"}


def read_table(table: Table, dialect: str, candidate: Candidate, options: Read) -> Adapter:
    """The adapter in a file of a dialect that is a table.

    Raises:
        BadFileError: LT-360 … LT-376, damaged or incomplete.
        MismatchError: LT-402, LT-415: an algorithm or a tensor that is not known.
    """
    header = candidate.header
    if header is None:
        raise BadFileError("LT-360", "no adapter weights in this folder", file=candidate.path)
    if reason := table.why_unreadable(header.metadata):
        raise MismatchError(
            "LT-402", f"{reason}: it is not supported", file=candidate.path,
            key=table.unreadable[0], got=header.metadata[table.unreadable[0]],
            hint="merge it with the program that wrote it",
        )  # fmt: skip
    found = read_tensors(table, header.tensors, options, header.metadata)
    notes = list(found.notes)
    if not header.tensors:
        notes.append("the file holds no tensors")
    return Adapter(
        candidate.path, dialect, found.specs, found.replacements, metadata=header.metadata,
        key_order=tuple(ref.name for ref in header.tensors), carried=found.carried,
        is_flat=table.is_flat, notes=tuple(notes),
    )  # fmt: skip


def read_tensors(
    table: Table,
    refs: Iterable[TensorRef],
    options: Read,
    metadata: Mapping[str, str] | None = None,
) -> Adapter:
    """Deltas, replacements, carried tensors and notes of a file; path and names stay empty."""
    found = _sort(table, refs)
    alphas, factors = read_scalars(found.alphas), read_scalars(found.factors)
    stated = _stated(table, metadata or {}, found.modules)
    specs: list[DeltaSpec] = []
    roles = {role for fields in found.modules.values() for role in fields}
    flagged = {role for role in roles if kinds.is_flag(role)}
    flags = read_scalars({fields[role].name: fields[role] for fields in found.modules.values()
                          for role in flagged & fields.keys()})  # fmt: skip
    for module, fields in found.modules.items():
        spec = product_spec(module, fields, alphas.get(module, options.alpha), flags)
        if table.bare and spec.layout == "linear":
            spec = replace(spec, alternatives=("",))  # the module itself may be a parameter
        said = stated(module, spec.rank) if spec.rank and spec.alpha is None else None
        if said is not None:
            spec = replace(spec, alpha=said.alpha, scaling=said.factor)
        start = found.starts.get(module, "")
        if start and not {"lora_A", "lora_B", "diag"} <= fields.keys():
            raise BadFileError("LT-362", "the factors of a module are incomplete", key=module,
                               file=found.refs[0].file, expected=start,
                               got=", ".join(ref.name for ref in fields.values()))  # fmt: skip
        if start or module in factors:
            scaling = spec.scaling * factors.get(module, 1.0)
            spec = replace(spec, base_change=start, scaling=scaling)
        specs.append(spec)
    gains = {spec.module: spec.scaling for spec in specs}
    specs += [_single(module, one, ref, gains) for module, one, ref in found.singles]
    grows = {*found.shapes, *table.growing}
    specs = [_growing(s, found.shapes.get(s.module)) if s.module in grows and s.is_matrix else s
             for s in specs]  # fmt: skip
    order = {ref.name: place for place, ref in enumerate(found.refs)}
    specs.sort(key=lambda s: min(order[f.name] for f in s.fields.values()))
    notes = []
    without = [s for s in specs if s.rank and s.alpha is None]
    if without:
        notes.append(plural(
            len(without), "module has no alpha: its scaling is 1",
            "modules have no alpha: their scaling is 1",
        ))  # fmt: skip
    orphans = [m for m in (*found.alphas, *found.factors) if m not in found.modules]
    if orphans:
        notes.append(
            f"{plural(len(orphans), 'alpha belongs', 'alphas belong')} to no module: "
            f"{list_some(orphans, 3)}"
        )
    if lost := sorted(found.shapes.keys() - {s.module for s in specs if s.is_matrix}):
        notes.append(
            f"{plural(len(lost), 'shape belongs', 'shapes belong')} to no module: "
            f"{list_some(lost, 3)}"
        )
    if found.passed:
        names = list_some((ref.name for ref in found.passed), 3)
        kept = plural(len(found.passed), "tensor is kept as it is", "tensors are kept as they are")
        notes.append(f"{kept}, not merged: {names}")
    numbers = (found.alphas, found.factors, found.shapes)
    carried = (*(ref for some in numbers for ref in some.values()), *found.passed)
    return Adapter(Path(), "", tuple(specs), tuple(found.sets), carried=carried,
                   notes=tuple(notes))  # fmt: skip


def _growing(spec: DeltaSpec, ref: TensorRef | None) -> DeltaSpec:
    """A change before which the weight gets its shape, as a tensor may state it."""
    out, inner = side_sizes(spec)
    if ref is not None and list(shape := read_shape(ref)) != [out, *inner]:
        raise BadFileError(
            "LT-366", "the factors do not have the shape that the file states", file=ref.file,
            key=ref.name, expected=list(shape), got=[out, *inner],
        )  # fmt: skip
    return replace(spec, settings={**spec.settings, GROWS: 1})


def read_shape(ref: TensorRef) -> tuple[int, ...]:
    """The whole numbers of a tensor that states a shape.

    Raises:
        BadFileError: LT-376, it states none.
    """
    if ref.dtype not in ("I64", "I32") or not 1 <= ref.numel <= 5:
        _refuse_scalar(ref, f"{ref.dtype} {list(ref.shape)}")
    form = _SCALARS[ref.dtype][1] * ref.numel
    return struct.unpack(f"<{form}", bytes(read_bytes(ref)))


def _stated(table: Table, metadata: Mapping[str, str], modules: Collection[str]) -> Stated:
    if table.header is None:
        return lambda module, rank: None
    return table.header.read(metadata, modules)


class _Sorted(Struct):
    """The tensors of a file by what they are."""

    refs: list[TensorRef]
    modules: dict[str, dict[str, TensorRef]] = field(default_factory=dict)
    singles: list[tuple[str, Field, TensorRef]] = field(default_factory=list)
    sets: list[Replacement] = field(default_factory=list)
    alphas: dict[str, TensorRef] = field(default_factory=dict)
    starts: dict[str, str] = field(default_factory=dict)
    factors: dict[str, TensorRef] = field(default_factory=dict)
    shapes: dict[str, TensorRef] = field(default_factory=dict)
    passed: list[TensorRef] = field(default_factory=list)


def _sort(table: Table, refs: Iterable[TensorRef]) -> _Sorted:
    found = _Sorted(list(refs))
    unknown = []
    for ref in found.refs:
        key = table.parse(ref.name)
        meaning = None if key is None else table.field_of(key.suffix)
        if key is not None and table.alpha and key.suffix == table.alpha:
            found.alphas[key.module] = ref
        elif key is not None and table.factor and key.suffix == table.factor:
            found.factors[key.module] = ref
        elif key is not None and table.grows and key.suffix == table.grows:
            found.shapes[key.module] = ref
        elif key is not None and meaning is not None and meaning.is_set:
            check_float(ref)
            found.sets.append(Replacement(f"{key.module}.{meaning.parameter}", ref, SET))
        elif key is not None and meaning is not None and meaning.kind:
            found.singles.append((key.module, meaning, ref))
        elif key is not None and meaning is not None:
            fields = found.modules.setdefault(key.module, {})
            if meaning.role in fields:
                raise BadFileError(
                    "LT-367", "two tensors mean the same", file=ref.file, key=key.module,
                    got=f"{fields[meaning.role].name} and {ref.name}",
                )  # fmt: skip
            fields[meaning.role] = _by_parts(table, key.module, meaning.role, ref)
            if meaning.start:
                found.starts[key.module] = meaning.start
        elif table.is_passed(ref.name):
            found.passed.append(ref)
        else:
            unknown.append(ref)
    if unknown:
        _refuse_unknown(unknown)
    _check_adapters(table, found.refs)
    if table.lone and not any(fields.keys() - {table.lone} for fields in found.modules.values()):
        whole = Field("", "full_delta", kind="full")
        found.singles += [(m, whole, fields[table.lone]) for m, fields in found.modules.items()]
        found.modules = {}
    return found


def _by_parts(table: Table, module: str, role: str, ref: TensorRef) -> TensorRef:
    """A left factor in the order q, k, v where the file has the rows of one head after another."""
    pattern, head = table.by_heads
    if not pattern or role != "lora_B" or not re.search(pattern, module):
        return ref
    if table.adapter_of(ref.name) != "default" or len(ref.shape) != 2 or ref.shape[0] % (3 * head):
        return ref
    rows, rank = ref.shape
    there = arranged(ref, (rows // (3 * head), 3, head, rank), (1, 0, 2, 3), ref.shape)
    assert isinstance(there, TensorRef)
    return there


def _check_adapters(table: Table, refs: list[TensorRef]) -> None:
    names = {name for ref in refs if (name := table.adapter_of(ref.name))}
    if len(names) > 1:
        raise MismatchError(
            "LT-410", "the file holds several adapters", file=refs[0].file, got=list_some(names),
            hint="save them one by one",
        )  # fmt: skip


def _refuse_unknown(refs: list[TensorRef]) -> None:
    names = [ref.name for ref in refs]
    for pattern, title in ALGORITHMS:
        of_it = [n for n in names if re.search(rf"\.(?:{pattern})", n)]
        if of_it:
            raise MismatchError(
                "LT-402", f"{title} adapters are not supported", file=refs[0].file,
                key=list_some(of_it, 3), got=f"{plural(len(of_it), 'tensor')} of {title}",
                hint="merge or convert it with the program that wrote it",
            )  # fmt: skip
    raise MismatchError(
        "LT-415", "LoRA tensors of an unknown kind", file=refs[0].file, key=list_some(names),
        hint="which program and version wrote them?",
    )  # fmt: skip


def _single(module: str, one: Field, ref: TensorRef, gains: Mapping[str, float]) -> DeltaSpec:
    """A change of its own, scaled only as the factors of its module are.

    The weight may be the module itself, a bare parameter.
    """
    check_float(ref)
    if 0 in ref.shape or not 1 <= len(ref.shape) <= 5:
        refuse_shape(ref, "1 to 5 dimensions, none of them empty")
    if one.parameter == "bias" and len(ref.shape) > 1:
        refuse_shape(ref, "one dimension, as biases have")
    row = kinds.of_tensor(one.kind, ref.shape)
    layout = "vector" if not row.is_matrix else "conv" if len(ref.shape) > 2 else "linear"
    scaling = gains.get(module, 1.0) if one.is_scaled else 1.0
    return DeltaSpec(row.name, module, one.parameter, {row.roles[0]: ref}, layout, 0, None, scaling,
                     alternatives=("",) if one.parameter == "weight" else ())  # fmt: skip


def read_scalars(refs: Mapping[str, TensorRef]) -> dict[str, float]:
    """The numbers in tensors of one element.

    Raises:
        BadFileError: LT-376, more than one, of no known type, or no usable number.
    """
    found = {}
    with FileReader() as reader:
        for ref in refs.values():
            if ref.numel != 1 or ref.dtype not in (*_SCALARS, "BF16"):
                _refuse_scalar(ref, f"{ref.dtype} {list(ref.shape)}")
        for (name, ref), raw in zip(refs.items(), reader.read_small(refs.values()), strict=True):
            value = _number(ref.dtype, raw)
            if not math.isfinite(value) or abs(value) > MAX_ALPHA:
                _refuse_scalar(ref, value)
            found[name] = value
    return found


def _number(dtype: str, raw: bytes) -> float:
    if dtype == "BF16":  # the upper half of a float32
        return float(struct.unpack("<f", b"\0\0" + raw)[0])
    return float(struct.unpack(_SCALARS[dtype], raw)[0])


def _refuse_scalar(ref: TensorRef, got: object) -> None:
    raise BadFileError(
        "LT-376", "alpha is no usable number", file=ref.file, key=ref.name, got=got,
        expected=f"one number of at most {MAX_ALPHA:g}",
    )  # fmt: skip
