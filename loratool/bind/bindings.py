"""Which tensor of the base does each delta of an adapter change?

Names are matched by one rule for the whole adapter (a known renaming, one prefix, or both);
the first rule that gives every module a target of the right shape wins, and a second rule of
the same rank with another result is an error.  Nothing is ever half bound.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from loratool.adapter import Adapter, TensorRef
from loratool.archs.stated import layer_config
from loratool.archs.ties import Tie, find_ties, follows_vocabulary
from loratool.bind.experts import place_flat, place_single
from loratool.bind.flat import in_order_of_heads, place_pieces, resolve_names
from loratool.bind.fused import place_fused
from loratool.bind.heads import take_heads
from loratool.bind.items import (
    Bindings,
    BoundDelta,
    BoundReplacement,
    Found,
    Item,
    Misfit,
)
from loratool.bind.joint import join_changes
from loratool.bind.layers import replicate_layers
from loratool.bind.names import NameRule, name_rules
from loratool.bind.place import (
    Context,
    Placement,
    check_rows,
    flag_holds,
    place_on,
    place_replacement,
    place_vector,
)
from loratool.bind.repeats import without_repeats, words_of
from loratool.bind.report import (
    ambiguous_error,
    collision_error,
    shape_error,
    unmatched_error,
)
from loratool.bind.settle import settle
from loratool.bind.tokens import place_new_tokens
from loratool.bind.user_names import apply_user_names
from loratool.dialects.stated import version_of
from loratool.errors import MismatchError, UsageError
from loratool.frozen import Frozen, replace
from loratool.options.groups import Names
from loratool.store.checkpoint import Checkpoint

__all__ = [
    "Bindings",
    "BoundDelta",
    "BoundReplacement",
    "bind",
    "options_needed",
    "replicate_layers",
]

# Items on which a rule is judged before all of them are tried.
_SAMPLE = 24


class _Outcome(Frozen):
    """What one rule does with every item."""

    rule: NameRule
    found: tuple[Found, ...]
    misfits: tuple[Misfit, ...]
    context: Context
    repeats: int = 0

    @property
    def unnamed(self) -> tuple[Misfit, ...]:
        return tuple(m for m in self.misfits if m.reason == "name")

    @property
    def unfit(self) -> tuple[Misfit, ...]:
        return tuple(m for m in self.misfits if m.reason != "name")

    @property
    def places(self) -> frozenset[tuple[str, tuple[str, ...]]]:
        return frozenset((f.item.label, f.targets) for f in self.found)


def bind(adapter: Adapter, checkpoint: Checkpoint, options: Names | None = None) -> Bindings:
    """Give every delta and replacement of an adapter its target.

    Args:
        adapter: in neutral form.
        checkpoint: the base, headers only.
        options: what the user says about names.

    Returns:
        The bindings.  `Bindings.checkpoint` is the base that they name.

    Raises:
        MismatchError: LT-430 … LT-448; all offenders are listed.
        UsageError: LT-240 … LT-244.

    Example:
        >>> bindings = bind(open_adapter(Path("style")), open_checkpoint(Path("base")))
        >>> bindings.deltas[0].target
        'model.layers.0.mlp.down_proj.weight'
    """
    options = options or Names()
    _check_options(options)
    config_changes = {}
    if adapter.layer_order is not None:
        config_changes = layer_config(checkpoint.config, adapter.layer_order)
        checkpoint = replicate_layers(checkpoint, adapter.layer_order)
    items, skipped, notes = apply_user_names(adapter, options)
    if not items:
        if adapter.specs or adapter.replacements:
            raise MismatchError(
                "LT-448", "--skip leaves nothing to bind", file=adapter.path, got=skipped
            )
        return Bindings((), skipped=skipped, notes=notes, checkpoint=checkpoint)
    items = resolve_names(items, checkpoint, adapter)
    outcome = _choose(items, adapter, checkpoint, options)
    left_out = tuple(sorted({m.item.module for m in outcome.misfits}))
    bindings = settle(outcome.found, outcome.context, adapter)
    joined = join_changes(bindings.deltas, adapter)
    deltas, of_heads = in_order_of_heads(joined, checkpoint, adapter)
    return replace(
        bindings,
        deltas=deltas,
        created={f.created: created for f in outcome.found if (created := _created(f))},
        config_changes={**config_changes, **bindings.config_changes},
        rule=outcome.rule.words,
        skipped=tuple(sorted({*skipped, *left_out})),
        notes=(*notes, *bindings.notes, *of_heads, *words_of(outcome.repeats)),
        checkpoint=checkpoint,
    )


def _created(found: Found) -> tuple[str, TensorRef] | None:
    replacement = found.item.replacement
    if not found.created or replacement is None or not isinstance(replacement.source, TensorRef):
        return None
    return replacement.name, replacement.source


def options_needed(adapter: Adapter, checkpoint: Checkpoint) -> tuple[str, ...]:
    """What ``merge`` asks for on top of its defaults to make of a base what PEFT makes of it."""
    options, flags = Names(), []
    names = [s.name for s in adapter.specs] + [r.name for r in adapter.replacements]
    while any(follows_vocabulary(name) for name in names):
        try:
            bind(adapter, take_heads([adapter], checkpoint).checkpoint, options)
            break
        except MismatchError as error:
            if error.code == "LT-442" and not options.resize_embeddings:
                options = options.replace(resize_embeddings=True)
                flags.append("--resize-embeddings")
            elif error.code == "LT-440" and not options.untie:
                options = options.replace(untie=True)
                flags.append("--untie")
            else:
                break
    return tuple(flags)


def _check_options(options: Names) -> None:
    if options.untie and options.keep_tied:
        raise UsageError("LT-243", "--untie and --keep-tied exclude each other")
    if options.moe_layout not in (None, "eoi", "eio"):
        raise UsageError(
            "LT-244", "unknown --moe-layout", expected="eoi or eio", got=options.moe_layout
        )


def _choose(
    items: Sequence[Item], adapter: Adapter, checkpoint: Checkpoint, options: Names
) -> _Outcome:
    """The first rule, by rank, that places everything; else the error that says most."""
    ties = find_ties(checkpoint, is_stated=options.untie or options.keep_tied)
    absent = [name for tie in ties for name in tie.missing]
    sample = items[:: max(1, len(items) // _SAMPLE)]
    tried: list[_Outcome] = []
    complete: list[_Outcome] = []
    partial: list[NameRule] = []
    for rule in name_rules(checkpoint, (i.name for i in items), absent):
        if complete and rule.rank > complete[0].rule.rank:
            break
        if tried:  # the exact rule is always tried in full, for the report
            unnamed = len(_try(rule, sample, adapter, checkpoint, options, ties).unnamed)
            if unnamed:
                partial.extend([rule] if unnamed < len(sample) else [])
                continue
        outcome = _try(rule, items, adapter, checkpoint, options, ties)
        tried.append(outcome)
        if not outcome.misfits and _collision(outcome) is None:
            complete.append(outcome)
    if complete:
        return _only_one(complete, checkpoint)
    tried.extend(_try(rule, items, adapter, checkpoint, options, ties) for rule in partial)
    return _best_effort(tried, items, checkpoint, options)


def _best_effort(
    tried: Sequence[_Outcome], items: Sequence[Item], checkpoint: Checkpoint, options: Names
) -> _Outcome:
    """No rule places everything: the error, or with ``--allow-unmatched`` the fullest rule."""
    # Fewest missing names first: a rule that finds all names tells the truth about shapes.
    best = min(tried, key=lambda o: (len(o.unnamed), len(o.unfit), o.rule.rank))
    if not best.found and not best.unfit:
        best = tried[0]
    if best.unfit and not (best.unnamed and len(best.unnamed) >= len(best.unfit)):
        raise shape_error(best.unfit, checkpoint)
    if best.unnamed and (not options.allow_unmatched or not best.found):
        total = len({i.module for i in items})
        raise unmatched_error(best.unnamed, best.found, total, checkpoint)
    if best.unfit:
        raise shape_error(best.unfit, checkpoint)
    clash = _collision(best)
    if clash is not None:
        raise collision_error(clash[1], clash[0], checkpoint)
    return _only_one([best, *(o for o in tried if _is_as_good(o, best))], checkpoint)


def _is_as_good(one: _Outcome, other: _Outcome) -> bool:
    return (
        one.rule.rank == other.rule.rank
        and len(one.misfits) == len(other.misfits)
        and _collision(one) is None
    )


def _only_one(outcomes: Sequence[_Outcome], checkpoint: Checkpoint) -> _Outcome:
    first = outcomes[0]
    for other in outcomes[1:]:
        if other.places != first.places:
            raise ambiguous_error(first.rule.words, other.rule.words, checkpoint)
    return first


def _try(
    rule: NameRule,
    items: Sequence[Item],
    adapter: Adapter,
    checkpoint: Checkpoint,
    options: Names,
    ties: tuple[Tie, ...],
) -> _Outcome:
    context = Context(checkpoint, options, rule.view, ties, version_of(adapter))
    context.shown = frozenset(_shown(items, rule, context))
    found: list[Found] = []
    misfits: list[Misfit] = []
    # Replacements first: they may change the shape that deltas must fit.
    for item in sorted(items, key=lambda i: i.spec is not None):
        placed = _place(item, rule, context)
        if isinstance(placed, Found):
            found.append(placed)
        else:
            misfits.append(placed)
    for placed in list(found):
        if placed.item.is_tokens:
            problem = check_rows(placed.item, placed.targets[0], context)
            if problem is not None:
                found.remove(placed)
                misfits.append(problem)
    found, repeats = without_repeats(found, context)
    return _Outcome(rule, tuple(found), tuple(misfits), context, repeats)


def _shown(items: Sequence[Item], rule: NameRule, context: Context) -> Iterator[bool]:
    for item in items:
        if item.spec is None or not item.spec.transposed:
            continue
        target = rule.view.get(rule.rename(item.name))
        if target is not None:
            holds = flag_holds(item.spec, target, context.shape(target))
            if holds is not None:
                yield holds


def _place(item: Item, rule: NameRule, context: Context) -> Placement:
    """Try the item's names in turn; the first that has a fitting target wins."""
    failure: Misfit | None = None
    for name in item.names:
        placed = _place_name(item, rule.rename(name), context)
        if isinstance(placed, Found):
            return placed
        if failure is None or failure.reason == "name":
            failure = placed
    assert failure is not None
    return failure


def _place_name(item: Item, name: str, context: Context) -> Placement:
    spec = item.spec
    if item.pieces is not None:
        return place_pieces(item, context)
    if item.is_new_tokens:
        return place_new_tokens(item, context)
    if spec is None:
        return place_replacement(item, name, context)
    if spec.layout == "experts":
        return place_flat(item, name, context)
    target, alias = context.lookup(name)
    if target is not None:
        if not spec.is_matrix:
            return place_vector(item, spec, target, context)
        if spec.is_bare and spec.layout == "linear" and len(context.shape(target)) == 3:
            # One matrix in a stack: its factors do not tell it from a plain one.
            only = replace(item, spec=replace(spec, layout="experts", experts=1))
            return place_flat(only, name, context)
        return place_on(item, spec, target, alias, context)
    elsewhere = place_single(item, name, context) or place_fused(item, name, context)
    if elsewhere is not None:
        return elsewhere
    if not spec.is_matrix and context.lookup(f"{name.rpartition('.')[0]}.weight")[0]:
        if spec.row.is_companion:
            return Found(item)
        return Misfit(item, "LT-438", expected=name, got="no such tensor")
    return Misfit(item, "name")


def _collision(outcome: _Outcome) -> tuple[str, tuple[str, ...]] | None:
    """(target, names) of two differently named items on the same place, None if injective."""
    holders: dict[str, list[tuple[object, bool, str]]] = {}
    for found in outcome.found:
        if found.alias or found.item.is_tokens:
            continue
        for target, place, is_whole in _places(found):
            for other, other_whole, name in holders.get(target, ()):
                same = other == place or is_whole or other_whole
                if same and name != found.item.label:
                    return target, (name, found.item.label)
            holders.setdefault(target, []).append((place, is_whole, found.item.label))
    return None


def _places(found: Found) -> list[tuple[str, object, bool]]:
    if found.created or found.replacement is not None:
        target = found.created or found.targets[0]
        rows = found.replacement.replacement.rows if found.replacement else None
        return [(target, rows, rows is None)]
    return [
        (d.target, (d.region.rows, d.region.cols), not d.region.rows and not d.region.cols)
        for d in found.deltas
    ]
