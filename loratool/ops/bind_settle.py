"""After the names: tied tensors, grown vocabularies, stored twins, notes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from loratool.adapter import Adapter
from loratool.archs.ties import Tie, is_vocabulary, stored_twins, untied_config
from loratool.errors import MismatchError
from loratool.ops.bind_place import Context
from loratool.ops.bind_types import Bindings, BoundDelta, BoundReplacement, Found
from loratool.store.reader import have_same_bytes


def settle(found: Sequence[Found], ctx: Context, adapter: Adapter) -> Bindings:
    """Turn placed items into bindings; decide about tied tensors and vocabulary sizes.

    Raises:
        MismatchError: LT-440, LT-441, LT-443.
    """
    notes: list[str] = list(_mha_notes(found, ctx))
    changes: dict[str, Any] = {}
    new_tensors: dict[str, str] = {}
    if ctx.tie is not None:
        found, is_untied, note = _settle_tie(found, ctx, ctx.tie, adapter)
        if is_untied:
            new_tensors[ctx.tie.missing] = ctx.tie.stored
            changes |= untied_config(ctx.config)
        if note:
            notes.append(note)
    changes |= _vocabulary_changes(found, ctx, new_tensors)
    bindings = Bindings(
        tuple(d for f in found for d in f.deltas),
        tuple(f.replacement for f in found if f.replacement is not None),
        new_tensors=new_tensors,
        config_changes=changes,
        notes=tuple(notes),
    )
    deltas, replaced = _twins(bindings, ctx)
    if deltas or replaced:
        notes.append(f"{len(deltas) + len(replaced)} stored copies of shared tensors change too")
    return replace(
        bindings,
        deltas=(*bindings.deltas, *deltas),
        replacements=(*bindings.replacements, *replaced),
        notes=tuple(notes),
    )


def _settle_tie(
    found: Sequence[Found], ctx: Context, tie: Tie, adapter: Adapter
) -> tuple[list[Found], bool, str]:
    """What happens to a tied pair: (items, is it untied, note)."""
    here = [f for f in found if not f.alias and tie.stored in f.targets]
    there = [f for f in found if f.alias]
    rest = [f for f in found if not f.alias and tie.stored not in f.targets]
    own, other = _changing(here), _changing(there)
    options = ctx.options
    if options.untie and (own or other or _has_tokens([*here, *there])):
        return (
            [*rest, *here, *_moved(there, tie), *_shared_tokens(here, there, tie)],
            True,
            (f"{tie.missing} is written and tie_word_embeddings switched off, as asked"),
        )
    if own and other:
        if _is_one_change(own, other, adapter):
            return (
                [*rest, *here],
                False,
                (f"the same change on {tie.stored} and {tie.missing}: merged once, still tied"),
            )
        if options.keep_tied:
            raise MismatchError(
                "LT-441",
                "two different changes of one tied tensor cannot both be kept",
                key=f"{tie.stored}, {tie.missing}",
                hint="leave out --keep-tied: the tensors are then untied",
            )
        return (
            [*rest, *here, *_moved(there, tie), *_shared_tokens(here, there, tie)],
            True,
            (
                f"the adapter changes both tied tensors: {tie.missing} is written, "
                "tie_word_embeddings is switched off"
            ),
        )
    if not own and not other:
        note = "trainable tokens change the tied tensor once" if here or there else ""
        return [*rest, *(here or _kept(there, tie))], False, note
    if not options.keep_tied:
        changed = tie.stored if own else tie.missing
        raise MismatchError(
            "LT-440",
            f"the adapter changes {changed} only, but the base ties it to "
            f"{tie.missing if own else tie.stored}",
            file=ctx.checkpoint.path,
            key=changed,
            hint="--untie writes both tensors (what the adapter was trained as in PEFT); "
            "--keep-tied changes the shared one",
        )
    return [*rest, *here, *_kept(there, tie)], False, "the change applies to both tied tensors"


def _changing(found: Sequence[Found]) -> list[Found]:
    """Items that really change a tensor: base copies saved along with a delta do not count."""
    return [f for f in found if not f.item.is_tokens and not _is_base_copy(f)]


def _is_base_copy(found: Found) -> bool:
    return found.replacement is not None and found.replacement.replacement.origin == "base_layer"


def _has_tokens(found: Sequence[Found]) -> bool:
    return any(f.item.is_tokens for f in found)


def _moved(found: Sequence[Found], tie: Tie) -> list[Found]:
    """Items of the missing tensor, on a tensor of its own."""
    return [
        replace(
            f,
            deltas=tuple(replace(d, target=tie.missing) for d in f.deltas),
            replacement=f.replacement and replace(f.replacement, target=tie.missing),
            alias="",
        )
        for f in found
    ]


def _kept(found: Sequence[Found], tie: Tie) -> list[Found]:
    return [replace(f, alias="") for f in found]


def _shared_tokens(here: Sequence[Found], there: Sequence[Found], tie: Tie) -> list[Found]:
    """PEFT ties trainable tokens: untied tensors both need the new rows."""
    tokens = [f for f in here if f.item.is_tokens]
    return _moved(tokens, tie) if not _has_tokens(there) else []


def _is_one_change(own: Sequence[Found], other: Sequence[Found], adapter: Adapter) -> bool:
    """True if both tied tensors change alike, so that they may stay one."""
    if adapter.config.get("ensure_weight_tying") is True:
        return True
    if len(own) != 1 or len(other) != 1:
        return False
    first, second = own[0].replacement, other[0].replacement
    if first is None or second is None:
        return False
    return have_same_bytes([first.replacement.source, second.replacement.source])


def _vocabulary_changes(
    found: Sequence[Found], ctx: Context, new_tensors: Mapping[str, str]
) -> dict[str, Any]:
    """New vocabulary size for config.json; every tensor over the vocabulary must have it."""
    tensors = ctx.checkpoint.tensors
    grown: dict[str, int] = {}
    old_sizes: set[int] = set()
    for item in found:
        bound = item.replacement
        if bound is None or bound.replacement.rows is not None:
            continue
        size = bound.replacement.source.shape[:1]
        old = tensors[new_tensors.get(bound.target, bound.target)].shape[:1]
        if size != old and is_vocabulary(bound.target):
            grown[bound.target] = size[0]
            old_sizes.add(old[0])
    if not grown:
        return {}
    over_vocabulary = [n for n in tensors if n.endswith(".weight") and is_vocabulary(n)]
    partners = {n for n in over_vocabulary if tensors[n].shape[0] in old_sizes} | set(new_tensors)
    missing = sorted(partners - set(grown))
    if missing or len(set(grown.values())) > 1:
        raise MismatchError(
            "LT-443",
            "only some of the tensors over the vocabulary get the new size",
            key=", ".join(f"{name} ({size})" for name, size in sorted(grown.items())),
            expected=f"the same number of rows in {', '.join(missing or sorted(grown))}",
            hint="the adapter must hold every resized tensor",
        )
    text = ctx.config.get("text_config")
    nested = isinstance(text, Mapping) and "vocab_size" in text
    keys = ["text_config.vocab_size"] if nested else []
    if "vocab_size" in ctx.config or not nested:
        keys.append("vocab_size")
    return dict.fromkeys(keys, next(iter(grown.values())))


def _twins(
    bindings: Bindings, ctx: Context
) -> tuple[tuple[BoundDelta, ...], tuple[BoundReplacement, ...]]:
    """The same change for every further stored copy of a shared tensor (DETR heads)."""
    touched = {b.target for b in bindings.deltas} | {b.target for b in bindings.replacements}

    def twins(target: str) -> Iterator[str]:
        yield from (t for t in stored_twins(ctx.checkpoint, target) if t not in touched)

    deltas = tuple(replace(d, target=t) for d in bindings.deltas for t in twins(d.target))
    replaced = tuple(replace(r, target=t) for r in bindings.replacements for t in twins(r.target))
    return deltas, replaced


def _mha_notes(found: Sequence[Found], ctx: Context) -> Iterator[str]:
    """PEFT's forward ignores a LoRA on ``out_proj`` alone inside a MultiheadAttention."""
    names = {f.item.name for f in found}
    for item in found:
        for delta in item.deltas:
            parent, _, leaf = delta.target.removesuffix(".weight").rpartition(".")
            joined = f"{parent}.in_proj_weight" if parent else "in_proj_weight"
            if leaf != "out_proj" or joined not in ctx.checkpoint.tensors:
                continue
            asked = item.item.name.removesuffix("out_proj.weight") + "in_proj_weight"
            if asked not in names:
                yield (
                    f"{item.item.module} lies inside a MultiheadAttention whose in_proj the "
                    "adapter leaves alone: PEFT's forward ignores it, merging adds it"
                )
