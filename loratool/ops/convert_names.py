"""Whole names for the modules of an adapter, on the way into a dialect that has the model's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loratool.adapter import Adapter, DeltaSpec
from loratool.archs.experts import parse_expert
from loratool.archs.families import family_of
from loratool.archs.flat import KnownNames, home_prefix, known_names
from loratool.archs.names import to_memory
from loratool.archs.stated import model_type
from loratool.bind.bindings import bind
from loratool.bind.flat import meanings_of
from loratool.bind.items import BoundDelta
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
        return replace(adapter, specs=specs, is_flat=False), "; ".join((words, *bindings.notes))
    shapes = {s.module: matrix_shape(s) for s in adapter.specs if s.is_matrix}
    family = family_of(shapes, adapter.metadata).family
    return _from_known(adapter, known_names(family))


def _living(adapter: Adapter, base: Checkpoint) -> tuple[Adapter, str]:
    """Under the names of the running model: one of images and text has its text deeper inside.

    Single experts keep their names, which loaders know.
    """
    bindings = bind(adapter, base, Names(untie=True, resize_embeddings=True))
    found = {one.replacement.name: one.target for one in bindings.replacements}
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
    whole = tuple(replace(r, name=living(r.name)) for r in adapter.replacements)
    words = f"modules are named as in {base.path.name}"
    return replace(adapter, specs=tuple(specs), replacements=whole), words


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
    found: Mapping[str, list[str]] = {
        s.name: [m.names[0] for m in meanings_of(s.name, known)] for s in adapter.specs
    }
    unknown = [name for name, names in found.items() if len(names) != 1]
    if unknown:
        raise MismatchError(
            "LT-404", f"no whole name is known of {plural(len(unknown), 'flat module')}",
            file=adapter.path, key=list_some(unknown, 3),
            hint="give the base model, --base BASE: its tensors name them",
        )  # fmt: skip
    parts = {s.module.rpartition(".")[0] for s in adapter.specs}
    several = len(parts) > 1
    specs = []
    for spec in adapter.specs:
        module, _, parameter = found[spec.name][0].rpartition(".")
        prefix = home_prefix(spec.module.rpartition(".")[0]) if several else ""
        specs.append(replace(spec, module=prefix + module, parameter=parameter))
    words = "modules are named as diffusers and transformers do" + (
        ", behind the names of the pipeline's parts" if several else ""
    )
    return replace(adapter, specs=tuple(specs), is_flat=False), words
