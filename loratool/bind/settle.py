"""After the names: tied tensors, grown vocabularies, stored twins, notes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from loratool.adapter import Adapter
from loratool.archs.layers import stores_transposed
from loratool.archs.ties import is_head, stored_twins
from loratool.bind.columns import widen
from loratool.bind.items import Bindings, BoundDelta, BoundReplacement, Found
from loratool.bind.place import Context
from loratool.bind.ties import settle_ties
from loratool.bind.vocabulary import follow_vocabulary
from loratool.frozen import replace
from loratool.report.text import plural


def settle(found: Sequence[Found], ctx: Context, adapter: Adapter) -> Bindings:
    """Turn placed items into bindings; decide about tied tensors and vocabulary sizes.

    Raises:
        MismatchError: LT-420, LT-421, LT-440, LT-441, LT-443.
    """
    notes = [*_mha_notes(found, ctx), *_bias_notes(found, ctx), *_token_notes(found)]
    notes += _turned_notes(found, ctx)
    settled = settle_ties(found, ctx, adapter)
    resized, wider = follow_vocabulary(settled, ctx), widen(ctx.resized, ctx.checkpoint)
    bindings = Bindings(
        tuple(d for f in settled.found for d in f.deltas),
        (*(f.replacement for f in settled.found if f.replacement), *resized.replacements,
         *wider.replacements),
        new_tensors=settled.new_tensors,
        grown=resized.grown,
        config_changes={
            **settled.config_changes, **resized.config_changes, **wider.config_changes,
        },
        scales=settled.scales,
    )  # fmt: skip
    deltas, replaced = _twins(bindings, ctx)
    if deltas or replaced:
        copies = plural(len(deltas) + len(replaced), "stored copy", "stored copies")
        notes.append(f"changed too: {copies} of shared tensors")
    return replace(
        bindings,
        deltas=(*bindings.deltas, *deltas),
        replacements=(*bindings.replacements, *replaced),
        notes=(*settled.notes, *notes, *resized.notes, *wider.notes),
    )


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


def _turned_notes(found: Sequence[Found], ctx: Context) -> Iterator[str]:
    """Square weights that are taken as stored (in, out) because the adapter says so, no more."""
    turned = [
        f for f in found
        if not ctx.shown and f.item.spec is not None and f.item.spec.transposed
        and any(d.transposed for d in f.deltas)
        and stores_transposed(ctx.config, f.targets[0].rpartition(".")[0]) is None
    ]  # fmt: skip
    if turned:
        yield (
            f"{plural(len(turned), 'square weight')} taken as stored (in, out): fan_in_fan_out of "
            "the adapter says so, and nothing else tells"
        )


def _token_notes(found: Sequence[Found]) -> Iterator[str]:
    for one in found:
        bound = one.replacement if one.item.is_new_tokens else None
        if bound is not None and bound.replacement.rows:
            first, *_, last = (*bound.replacement.rows, bound.replacement.rows[-1])
            which = f"token {first}" if first == last else f"tokens {first} to {last}"
            yield f"{which} of {one.alias or bound.target} come from new_embeddings.safetensors"


def _bias_notes(found: Sequence[Found], ctx: Context) -> Iterator[str]:
    """PEFT's forward leaves the bias of a head out while rows of it are trained."""
    rows = [f for f in found if f.item.is_tokens and not f.item.is_new_tokens]
    names = {t for f in rows for t in (f.alias, *f.targets) if t}
    names |= {n for tie in ctx.ties for n in tie.names if names & set(tie.names)}
    for bias in sorted(n.removesuffix("weight") + "bias" for n in names if is_head(n)):
        tied = next((t.stored[0] for t in ctx.ties if bias in t.names), bias)
        if tied in ctx.checkpoint.tensors:
            yield f"{bias}: PEFT's forward leaves it out while rows are trained, merged it counts"
