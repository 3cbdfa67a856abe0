"""Names of image and video models on the tensors of a base: looked up, never un-flattened."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from loratool.adapter import Adapter, DeltaSpec, TensorRef
from loratool.archs.by_heads import by_heads, cut_at, head_rows, is_order_untold
from loratool.archs.families import Guess, family_of, module_shapes, split_component
from loratool.archs.flat import FlatNames, KnownNames, Meaning, flat_names
from loratool.archs.stated import model_type
from loratool.bind.items import BoundDelta, Found, Item, Misfit
from loratool.bind.place import Context, Placement, cut_groups, known_size, misfit, unmergeable
from loratool.bind.seen import Piece, joined, pieces_of, seen_in, shaped, turned, width_of
from loratool.delta.forms import shape_of, side_sizes, spans_rows
from loratool.dialects import DEFAULT
from loratool.dialects.rules import is_of_home
from loratool.dtypes import numel
from loratool.errors import MismatchError, list_some
from loratool.frozen import replace
from loratool.plan import Region, Span
from loratool.report.text import plural
from loratool.store.checkpoint import Checkpoint


def resolve_names(items: Sequence[Item], checkpoint: Checkpoint, adapter: Adapter) -> list[Item]:
    """The items under the names that the base has for them; what it lacks keeps its own.

    Dotted names are looked up where the base is an image or video model that spells them otherwise.

    Raises:
        MismatchError: LT-495, a name that several tensors of the base may go by.
    """
    if not adapter.is_flat and not _is_foreign(items, checkpoint):
        return list(items)
    index = flat_names(checkpoint.tensors)
    meanings = [meanings_of(item.name, index) for item in items]
    if any(len(some) > 1 for some in meanings):
        told = _family(checkpoint).family or _family_of_names(items, adapter)
        index = flat_names(checkpoint.tensors, told)
        meanings = [meanings_of(item.name, index) for item in items]
    pairs = list(zip(items, meanings, strict=True))
    unclear = {item.module: some for item, some in pairs if len(some) > 1}
    if unclear:
        module, several = next(iter(unclear.items()))
        raise MismatchError(
            "LT-495", f"{plural(len(unclear), 'name')} may mean several tensors of the base",
            file=adapter.path, key=list_some(unclear), expected="one tensor",
            got=f"{module}: {' or '.join('+'.join(m.names) for m in several)}",
            hint="name the part of the base that the adapter is for, such as its unet folder",
        )  # fmt: skip
    if not adapter.is_flat and _are_as_spelled(pairs):
        return list(items)
    return [one for item, some in pairs
            for one in (_named(item, some[0], checkpoint) if some else (item,))]  # fmt: skip


def meanings_of(name: str, index: FlatNames | KnownNames) -> list[Meaning]:
    """What the full name of a parameter may mean."""
    component, rest = split_component(name)
    module, _, parameter = rest.rpartition(".")
    return index.look_up(component, module, parameter)


def in_order_of_heads(
    deltas: Sequence[BoundDelta], checkpoint: Checkpoint, adapter: Adapter
) -> tuple[tuple[BoundDelta, ...], tuple[str, ...]]:
    """(Changes of q, k and v where the base has the rows of these head by head, notes).

    A folder of PEFT is of the very module, whatever lies in it.
    """
    if is_of_home(adapter, DEFAULT):
        return tuple(deltas), ()
    is_told = not any(is_order_untold(checkpoint.config, d.target) for d in deltas)
    notes = () if is_told else (
        "rows of q, k and v are taken as ComfyUI's files have them, all of q first: the base has "
        "no config.json, by which MiniMax-H3's own shards are known, where they lie head by head",
    )  # fmt: skip
    placed = tuple(part for delta in deltas for part in _by_heads(delta, checkpoint))
    return placed, notes


def _by_heads(delta: BoundDelta, checkpoint: Checkpoint) -> Iterator[BoundDelta]:
    """The rows of q, k and v of a change each by themselves, where their heads lie."""
    head, ref = head_rows(checkpoint.config, delta.target), checkpoint.tensors.get(delta.target)
    if not head or ref is None or ref.shape[0] % (3 * head):
        yield delta
        return
    if spans_rows(delta.spec):
        raise MismatchError(
            "LT-439", f"a {delta.spec.title} needs all rows of a tensor in its own order",
            file=checkpoint.path, key=delta.target, got="q, k and v head by head",
            hint="a base of diffusers or ComfyUI has them in order",
        )  # fmt: skip
    rows, is_vector, region = ref.shape[0], len(ref.shape) == 1, delta.region
    spans = (region.cols if is_vector else region.rows) or (Span(0, rows),)
    first = (region.source_cols if is_vector else region.source_rows) or (0, 0)
    at = first[0]
    for start, stop in cut_at([(s.start, s.stop) for s in spans], rows // 3):
        place = tuple(Span(*s) for s in by_heads(start, stop, rows, head))
        own = (at, at + stop - start)
        at = own[1]
        changed = (replace(region, cols=place, source_cols=own) if is_vector
                   else replace(region, rows=place, source_rows=own))  # fmt: skip
        yield replace(delta, region=changed)


def _is_foreign(items: Sequence[Item], checkpoint: Checkpoint) -> bool:
    """True if the base is an image or video model that lacks some of the names."""
    tensors = checkpoint.tensors
    if model_type(checkpoint.config) or all(item.name in tensors for item in items):
        return False
    guess = _family(checkpoint)
    return guess.family is not None or bool(guess.others)


def _family(checkpoint: Checkpoint) -> Guess:
    shapes = ((name, ref.shape) for name, ref in checkpoint.tensors.items())
    return family_of(module_shapes(shapes))


def _family_of_names(items: Sequence[Item], adapter: Adapter) -> str | None:
    """The adapter's, which may have names that tell more than those of the base."""
    return family_of({item.module: () for item in items}, adapter.metadata).family


def _are_as_spelled(pairs: Sequence[tuple[Item, list[Meaning]]]) -> bool:
    """True if all names differ from the base's by one prefix more or less: rules find that."""
    prefixes = set()
    for item, some in pairs:
        rest = split_component(item.name)[1]
        if len(some) != 1 or some[0].holds or not some[0].names[0].endswith(rest):
            return False
        prefixes.add((item.name.removesuffix(rest), some[0].names[0].removesuffix(rest)))
    (one, other), *several = sorted(prefixes)
    return not several and (one.endswith(other) or other.endswith(one))


def _named(item: Item, meaning: Meaning, checkpoint: Checkpoint) -> Iterator[Item]:
    if not meaning.holds:
        new = item.replacement
        if new is not None and isinstance(new.source, TensorRef) and new.rows is None:
            ref = checkpoint.tensors[meaning.names[0]]
            there = shaped(new.source, ref.shape)
            if there.shape != new.source.shape:
                old = shaped(ref, new.source.shape)
                item = replace(item, replacement=replace(new, source=there), old=old)
        yield replace(item, names=meaning.names, is_translated=meaning.names != item.names)
        return
    pieced = replace(item, pieces=meaning, is_translated=True)
    yield from (item.replacement and list(_replaced(pieced, meaning, checkpoint))) or (pieced,)


def _replaced(item: Item, meaning: Meaning, checkpoint: Checkpoint) -> Iterator[Item]:
    """A replaced tensor, in the form that the base's tensors have; nothing if it does not fit."""
    new, tensors = item.replacement, checkpoint.tensors
    assert new is not None
    source, refs = new.source, [tensors[name] for name in meaning.names]
    if new.rows is not None or not isinstance(source, TensorRef):
        return
    old = seen_in(meaning, source, tensors)
    if old is None or old.shape != source.shape:
        return
    if meaning.swap == "axes":
        other = turned(source)
        if other is not None:
            yield _replacing(item, meaning.names[0], other, old)
        return
    width = width_of(meaning.names[0], tensors, lambda name: tensors[name].shape)
    pieces = list(pieces_of(meaning, [r.shape[0] for r in refs], source.shape[0], width))
    for number, (name, ref) in enumerate(zip(meaning.names, refs, strict=True)):
        own = sorted((p for p in pieces if p.tensor == number), key=lambda p: p.place or (0, 0))
        rows = [row for p in own for row in range(*(p.place or (0, ref.shape[0])))]
        part = joined(new.name, [(source, p.source) for p in own])
        yield _replacing(item, name, part, old, rows if len(rows) < ref.shape[0] else None)


def _replacing(
    item: Item, name: str, source: TensorRef, old: TensorRef, rows: Sequence[int] | None = None
) -> Item:
    assert item.replacement is not None
    new = replace(item.replacement, source=source, rows=None if rows is None else tuple(rows))
    return replace(item, names=(name,), pieces=None, replacement=new, old=old)


def place_pieces(item: Item, ctx: Context) -> Placement:
    """One change of rows that the base has in several tensors, in a part, or in other order."""
    spec, meaning = item.spec, item.pieces
    assert meaning is not None
    targets = [target for name in meaning.names if (target := ctx.view.get(name)) is not None]
    if len(targets) < len(meaning.names):
        return Misfit(item, "name")
    if spec is None:  # values that the base's tensors cannot be made of
        there = " + ".join(str(ctx.shape(t)) for t in targets)
        own = str(item.replacement.source.shape) if item.replacement else ""
        return misfit(item, "LT-445", there, own, targets[0])
    if spec.is_open:
        shape = ctx.shape(targets[0])
        settled = spec.row.settle(spec, shape_of(spec)[0], numel(shape[1:]))
        if settled is None:
            return misfit(item, "LT-432", str(shape), known_size(spec), targets[0])
        spec = settled
    inner = side_sizes(spec)[1] if spec.is_matrix else ()
    if meaning.swap == "axes":
        return _place_turned(item, spec, targets[0], ctx)
    for target in targets:
        if problem := unmergeable(item, target, ctx):
            return problem
        if ctx.shape(target)[1:] != inner:
            return misfit(item, "LT-432", str(ctx.shape(target)), f"(…, {inner})", target)
    rows, width = shape_of(spec)[0], width_of(targets[0], ctx.checkpoint.tensors, ctx.shape)
    try:
        pieces = list(pieces_of(meaning, [ctx.shape(t)[0] for t in targets], rows, width))
    except ValueError as problem:
        return misfit(item, "LT-432", str(problem), f"{rows} rows", targets[0])
    cuts = [p.source for p in pieces if p.source]
    if cuts and spans_rows(spec):
        return misfit(item, "LT-439", "all rows", f"rows {cuts[0][0]} to {cuts[0][1]}", targets[0])
    if odd := cut_groups(item, spec, cuts, targets[0]):
        return odd
    return Found(item, tuple(
        BoundDelta(spec, targets[p.tensor], _region(p, is_vector=not spec.is_matrix))
        for p in pieces
    ))  # fmt: skip


def _place_turned(item: Item, spec: DeltaSpec, target: str, ctx: Context) -> Placement:
    """A change of a matrix that the base has as (in, out)."""
    sides = ctx.shape(target)[::-1]
    if problem := unmergeable(item, target, ctx):
        return problem
    if not spec.is_matrix or shape_of(spec) != sides:
        return misfit(item, "LT-432", str(sides), str(shape_of(spec)), target)
    return Found(item, (BoundDelta(spec, target, transposed=True),))


def _region(piece: Piece, *, is_vector: bool) -> Region:
    place = () if piece.place is None else (Span(*piece.place),)
    if is_vector:  # a bias lies along the columns
        return Region(cols=place, source_cols=piece.source)
    return Region(rows=place, source_rows=piece.source)
