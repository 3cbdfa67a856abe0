"""Whole names for the modules of an adapter, on the way into a dialect that has the model's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loratool.adapter import Adapter, DeltaSpec, Replacement
from loratool.archs.experts import parse_expert
from loratool.archs.families import family_of, split_component
from loratool.archs.flat import KnownNames, Meaning, home_prefix, known_names
from loratool.archs.names import to_memory
from loratool.archs.stated import model_type
from loratool.bind.bindings import bind
from loratool.bind.flat import meanings_of
from loratool.bind.items import BoundDelta, BoundReplacement
from loratool.delta.forms import matrix_shape, reshaped
from loratool.delta.stacking import gather
from loratool.dialects.registry import row_of
from loratool.errors import MismatchError, list_some
from loratool.frozen import replace
from loratool.options.groups import Names
from loratool.report.text import plural
from loratool.store.checkpoint import Checkpoint


def named(adapter: Adapter, base: Checkpoint | None) -> tuple[Adapter, str]:
    """The adapter under whole names, and where they are from.

    Raises:
        MismatchError: LT-404, a module has none; others of binding.
    """
    if base is not None and row_of(adapter.dialect).table is None:
        return _living(adapter, base)
    if base is not None:
        bindings = bind(adapter, base)
        specs, words = _pieces(bindings.deltas, base), f"modules are named as in {base.path.name}"
        own = {r.name for r in adapter.replacements}
        whole = tuple(_whole(b, base) for b in bindings.replacements if b.replacement.name in own)
        adapter = replace(adapter, specs=specs, replacements=whole, is_flat=False)
        return adapter, "; ".join((words, *bindings.notes))
    shapes = {s.module: matrix_shape(s) for s in adapter.specs if s.is_matrix}
    family = family_of(shapes, adapter.metadata).family
    return _from_known(adapter, known_names(family))


def _living(adapter: Adapter, base: Checkpoint) -> tuple[Adapter, str]:
    """Under the names of the running model: one of images and text has its text deeper inside.

    Single experts keep their names, which loaders know.
    """
    bindings = bind(adapter, base, Names(untie=True, resize_embeddings=True))
    found = {one.replacement.name: one.target for one in bindings.replacements}
    formed = {one.replacement.name for one in bindings.replacements if one.old is not None}
    for delta in bindings.deltas:
        if delta.expert is None and parse_expert(delta.spec.name) is None:
            if delta.region.rows or delta.region.cols:
                raise _of_part(delta.target, base)
            found[delta.spec.name] = delta.target
    kind = model_type(base.config)

    def living(name: str) -> str:
        return to_memory(kind, found[name]) if name in found else name

    specs = []
    for spec in adapter.specs:
        module, _, parameter = living(spec.name).rpartition(".")
        specs.append(replace(spec, module=module, parameter=parameter))
    whole = [replace(r, name=living(r.name)) for r in adapter.replacements if r.name not in formed]
    whole += [_whole(b, base) for b in bindings.replacements if b.replacement.name in formed]
    words = f"modules are named as in {base.path.name}"
    return replace(adapter, specs=tuple(specs), replacements=tuple(whole)), words


def _whole(bound: BoundReplacement, base: Checkpoint) -> Replacement:
    """A replaced tensor under the name, and in the form, that the base has."""
    if bound.old is not None and bound.replacement.rows is not None:
        raise _of_part(bound.target, base)
    return replace(bound.replacement, name=bound.target)


def _of_part(target: str, base: Checkpoint) -> MismatchError:
    return MismatchError(
        "LT-404", "a module is part of a tensor of the base", key=target, file=base.path,
        hint="give a base whose modules are separate, or none",
    )  # fmt: skip


def _pieces(deltas: Sequence[BoundDelta], base: Checkpoint) -> tuple[DeltaSpec, ...]:
    """One change for every tensor of the base, with the rows that lie there."""
    by_target: dict[str, list[BoundDelta]] = {}
    for delta in deltas:
        by_target.setdefault(delta.target, []).append(delta)
    return tuple(_piece(name, parts, base) for name, parts in by_target.items())


def _piece(target: str, parts: Sequence[BoundDelta], base: Checkpoint) -> DeltaSpec:
    spec, dims = parts[0].spec, len(base.tensors[target].shape)
    module, _, parameter = target.rpartition(".")
    placed = sorted(parts, key=lambda d: [s.start for s in (*d.region.rows, *d.region.cols)])
    rows = [d.region.source_rows or d.region.source_cols for d in placed]
    whole = sum(b - a for a, b in (r for r in rows if r)) if all(rows) else None
    height = base.tensors[target].shape[0]
    if any(d.spec is not spec for d in parts) or whole not in (None, height):
        raise MismatchError(
            "LT-404", "a tensor of the base takes parts of several modules", key=target,
            file=base.path, hint="give a base in the adapter's own naming, or none",
        )  # fmt: skip
    if any(d.region.rows or d.region.cols for d in parts) and whole is None:
        raise _of_part(target, base)
    cut = [r for r in rows if r is not None]
    if cut:
        made = gather(spec, cut)
        if made is None:
            raise MismatchError(
                "LT-404", f"a {spec.title} of several tensors cannot be cut where they begin",
                key=target, file=base.path, hint="--to comfyui keeps it whole; --for diffusers "
                "makes a LoRA of it, which can be cut",
            )  # fmt: skip
        spec = made
    turned = parts[0].transposed
    return reshaped(replace(spec, module=module, parameter=parameter, transposed=turned), dims)


def _from_known(adapter: Adapter, known: KnownNames) -> tuple[Adapter, str]:
    """Names of Stable Diffusion, SDXL and FLUX, where nobody gave a base."""
    whole = [r.name for r in adapter.replacements]
    names = [*(s.name for s in adapter.specs), *whole]
    found: Mapping[str, list[Meaning]] = {name: meanings_of(name, known) for name in names}
    unknown = [name for name, some in found.items()
               if len(some) != 1 or (some[0].holds and name in whole)]  # fmt: skip
    if unknown:
        raise MismatchError(
            "LT-404", f"no whole name is known of {plural(len(unknown), 'flat module')}",
            file=adapter.path, key=list_some(unknown, 3),
            hint="give the base model, --base BASE: its tensors name them",
        )  # fmt: skip
    several = len({s.module.rpartition(".")[0] for s in adapter.specs}) > 1

    def known_name(name: str) -> str:
        component, _ = split_component(name)
        return (home_prefix(component) if several else "") + found[name][0].names[0]

    specs = []
    for spec in adapter.specs:
        module, _, parameter = known_name(spec.name).rpartition(".")
        specs.append(replace(spec, module=module, parameter=parameter))
    words = "modules are named as diffusers and transformers do" + (
        ", behind the names of the pipeline's parts" if several else ""
    )
    replaced = tuple(replace(r, name=known_name(r.name)) for r in adapter.replacements)
    return replace(adapter, specs=tuple(specs), replacements=replaced, is_flat=False), words
