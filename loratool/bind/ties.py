"""Tied tensors: changes that keep them one, or that give each name values of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from loratool.adapter import Adapter
from loratool.archs.stated import decoder_config
from loratool.archs.ties import Tie, head_scale, is_head, untied_config
from loratool.bind.items import Found
from loratool.bind.place import Context
from loratool.bind.same_change import are_alike
from loratool.delta.forms import only_start
from loratool.dialects.stated import COPY, changes_its_base, loads_into
from loratool.errors import MismatchError, list_some
from loratool.frozen import Frozen, field, replace
from loratool.options.groups import Names
from loratool.store.reader import have_same_bytes


class Settled(Frozen):
    """Items with their final targets, and what follows for the base.

    Attributes:
        found: the items; one may stand for several names of a tie.
        new_tensors: tensor to write -> stored one whose values it starts from.
        config_changes: changes to ``config.json``.
        scales: tensor -> factor of the finished sum.
        notes: one sentence each.
    """

    found: tuple[Found, ...]
    new_tensors: Mapping[str, str] = field(default_factory=dict)
    config_changes: Mapping[str, Any] = field(default_factory=dict)
    scales: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def settle_ties(found: Sequence[Found], ctx: Context, adapter: Adapter) -> Settled:
    """Decide for every tie of the base whether the adapter's changes keep it.

    One configuration flag stands for all ties of a model: where one goes, all go.

    Raises:
        MismatchError: LT-440 it must be asked, LT-441 or LT-421 they cannot be kept, LT-420 they
            cannot be given up.
    """
    groups = [_Group(tie, found, ctx, adapter) for tie in ctx.ties]
    if not groups:
        is_asked = ctx.options.untie or ctx.options.keep_tied
        note = ("nothing is tied in this base: there was nothing to do",) if is_asked else ()
        return Settled(tuple(found), notes=note)
    reasons = [_reason_to_split(group, ctx) for group in groups]
    first = next((r for r in reasons if r), "")
    inside = {id(f) for group in groups for items in group.items.values() for f in items}
    rest = [f for f in found if id(f) not in inside]
    if not first:
        kept = [f for group in groups for f in group.kept()]
        notes = [group.note(ctx.options) for group in groups]
        return Settled((*rest, *kept), notes=tuple(n for n in notes if n))
    split = [f for group in groups for f in group.split()]
    missing = {name: g.tie.stored[0] for g in groups for name in g.tie.missing}
    scales = _scales(groups, ctx)
    config = untied_config(ctx.config)
    if scales:
        first += f"; {list_some(scales)} takes over the factor {min(scales.values()):.4g}, which "
        first += "such models apply to the decoder's outputs only while they are tied"
        config |= decoder_config(ctx.config)
    return Settled((*rest, *split), missing, config, scales, (first,))


class _Group:
    """What an adapter does to the names of one tie.

    Attributes:
        tie: the names.
        items: name -> items on it, shared ones on every name that they reach.
    """

    def __init__(self, tie: Tie, found: Sequence[Found], ctx: Context, adapter: Adapter) -> None:
        self.tie = tie
        self.items: dict[str, list[Found]] = {name: [] for name in tie.names}
        for one in found:
            name = one.alias or next((t for t in one.targets if t in self.items), "")
            if name in self.items:
                self.items[name].append(one)
        own = {name: list(items) for name, items in self.items.items()}
        for name, items in own.items():
            for one in items:
                if _is_shared(one, name, tie, ctx, adapter):
                    self._share(one, own)
                if one.item.spec is not None and one.item.spec.base_change:
                    self._begin(one, name)

    def _share(self, one: Found, own: Mapping[str, Sequence[Found]]) -> None:
        """Lay a change of the one parameter on every name that has no such change itself."""
        alike = {name: [i for i in items if _kind(i) == _kind(one)] for name, items in own.items()}
        if (
            _kind(one) == "rows"
            and len({_numbers(i) for items in alike.values() for i in items}) > 1
        ):
            return  # PEFT ties rows only where all names train the same ones
        for items in self.items.values():
            if not any(_kind(i) == _kind(one) for i in items):
                items.append(one)

    def _begin(self, one: Found, name: str) -> None:
        """What loading takes away for a change goes from all names: the parameter is one."""
        deltas = tuple(replace(d, spec=only_start(d.spec)) for d in one.deltas)
        begun = replace(one, item=replace(one.item, spec=deltas[0].spec), deltas=deltas)
        for other, items in self.items.items():
            if other == name or any(_kind(i) == "whole" for i in items):
                continue
            if not all(i.item.spec is not None and i.item.spec.is_additive for i in items):
                raise MismatchError(
                    "LT-441", "two different changes of one tied tensor cannot both be kept",
                    key=f"{name}, {other}", got=f"{one.deltas[0].spec.title}, which changes both",
                    hint="--skip leaves one of them out",
                )  # fmt: skip
            items.append(begun)

    def main(self, name: str) -> list[Found]:
        """Changes of a name, without trained rows and copies of the base."""
        return [f for f in self.items[name] if _kind(f) in ("change", "whole")]

    def rows(self, name: str) -> list[Found]:
        """Trained rows of a name."""
        return [f for f in self.items[name] if _kind(f) == "rows"]

    @property
    def touched(self) -> list[str]:
        """Names with a change."""
        return [n for n in self.items if self.main(n) or self.rows(n)]

    @property
    def is_one(self) -> bool:
        """True if every name that is read changes alike."""
        return all(
            are_alike(self.main(self.tie.live[0]), self.main(n))
            and are_alike(self.rows(self.tie.live[0]), self.rows(n))
            for n in {*self.tie.live, *self.touched}
        )

    @property
    def is_consistent(self) -> bool:
        """True if the changes, wherever they are, are the same ones."""
        mains = [m for n in self.items if (m := self.main(n))]
        rows = [r for n in self.items if (r := self.rows(n))]
        return all(are_alike(same[0], other) for same in (mains, rows) for other in same[1:])

    def kept(self) -> list[Found]:
        """The changes, once, on every stored name."""
        order = [*self.tie.live, *self.tie.names]
        parts = [self._first(order, part) for part in (self._copies, self.main, self.rows)]
        chosen = _effective([f for part in parts for f in part])
        return [_moved(f, name) for name in self.tie.stored for f in chosen]

    def split(self) -> list[Found]:
        """Every change on its own name; a name that is not read follows the first that is."""
        out = []
        for name in self.items:
            items = self.items[name]
            if name not in self.tie.live and not items:
                leader = next((n for n in self.tie.live if not is_head(n)), self.tie.live[0])
                items = self.items[leader]
            out += [_moved(f, name) for f in _effective(items)]
        return out

    def note(self, options: Names) -> str:
        """What a user should know about a tie that stays."""
        if not self.touched:
            return ""
        changed = [n for n in self.touched if self.main(n)]
        if not changed:
            return "trainable tokens change the tied tensor once"
        if len(changed) == 1:
            return "the change applies to both tied tensors"
        return f"the same change on {list_some(changed, 4)}: merged once, still tied"

    @staticmethod
    def _first(order: Sequence[str], part: Callable[[str], list[Found]]) -> list[Found]:
        return next((found for name in order if (found := part(name))), [])

    def _copies(self, name: str) -> list[Found]:
        return [f for f in self.items[name] if _kind(f) == "copy"]


def _kind(found: Found) -> str:
    if found.item.is_tokens:
        return "rows"
    if found.replacement is None:
        return "change"
    return "copy" if found.replacement.replacement.origin == COPY else "whole"


def _effective(items: Sequence[Found]) -> list[Found]:
    """Without copies of the base where a trained tensor takes their place."""
    has_whole = any(_kind(f) == "whole" for f in items)
    return [f for f in items if not (has_whole and _kind(f) == "copy")]


def _numbers(found: Found) -> tuple[int, ...] | None:
    return found.replacement.replacement.rows if found.replacement else None


def _is_shared(one: Found, name: str, tie: Tie, ctx: Context, adapter: Adapter) -> bool:
    """Does PEFT put it into the parameter itself, which all names share?

    Rows of the input embedding are laid on every tied module.  A whole tensor that no
    ``modules_to_save`` lists is loaded into the model's own parameter.
    """
    kind = _kind(one)
    if kind == "rows":
        return name == tie.source
    if kind == "change" or one.replacement is None:
        return False
    if kind == "copy":  # of a grown vocabulary, or of what loading changed; else the base's values
        old = ctx.checkpoint.tensors[one.replacement.target].shape
        return one.replacement.replacement.source.shape != old or changes_its_base(adapter)
    return loads_into(adapter, one.item.label.rpartition(".")[0])


def _moved(found: Found, name: str) -> Found:
    return replace(
        found,
        deltas=tuple(replace(d, target=name) for d in found.deltas),
        replacement=found.replacement and replace(found.replacement, target=name),
        alias="",
    )


def _reason_to_split(group: _Group, ctx: Context) -> str:
    """Why a tie is given up, "" where it stays."""
    tie, options, touched = group.tie, ctx.options, group.touched
    apart = () if not (touched or options.keep_tied) else _apart(tie, ctx)
    if options.keep_tied:
        _require_one(group, apart, ctx)
        return ""
    off = "tie_word_embeddings is switched off"
    verb = "is" if len(tie.missing) == 1 else "are"
    written = f"{list_some(tie.missing, 4)} {verb} written, {off}" if tie.missing else off
    if options.untie:
        return f"{written}, as asked"
    if apart:
        return f"the base stores other values in {list_some(apart)}: {off}"
    if not touched or group.is_one:
        return ""
    if set(tie.live) <= set(touched):
        return f"the adapter changes the tied tensors differently: {written}"
    if _is_stored_twice(tie):
        return f"the adapter changes {list_some(touched, 4)} only: {off}"
    others = [n for n in tie.live if n not in touched] or list(tie.live)
    raise MismatchError(
        "LT-440",
        f"the adapter changes {list_some(touched, 4)} only, but the base ties it to "
        f"{list_some(others, 4)}",
        file=ctx.checkpoint.path,
        key=touched[0],
        hint="--untie writes both tensors (what the adapter was trained as in PEFT); "
        "--keep-tied changes the shared one",
    )


def _is_stored_twice(tie: Tie) -> bool:
    """The files have an embedding and a head: each can take its own change."""
    return len({is_head(name) for name in tie.stored}) == 2


def _apart(tie: Tie, ctx: Context) -> tuple[str, ...]:
    """Stored names that hold other values than the first: tied in the configuration alone."""
    first, *others = (ctx.checkpoint.tensors[name] for name in tie.stored)
    same = [have_same_bytes([first, other]) for other in others]
    return tuple(n for n, is_same in zip(tie.stored[1:], same, strict=True) if not is_same)


def _require_one(group: _Group, apart: Sequence[str], ctx: Context) -> None:
    if apart:
        raise MismatchError(
            "LT-421", "the base stores two different tensors: there is no tie to keep",
            file=ctx.checkpoint.path, key=f"{group.tie.stored[0]}, {list_some(apart)}",
            hint="leave out --keep-tied",
        )  # fmt: skip
    if not group.is_consistent:
        raise MismatchError(
            "LT-441", "two different changes of one tied tensor cannot both be kept",
            key=", ".join(group.touched),
            hint="leave out --keep-tied: the tensors are then untied",
        )  # fmt: skip


def _scales(groups: Sequence[_Group], ctx: Context) -> dict[str, float]:
    """T5 multiplies its decoder's outputs while tied: an own head takes the factor over."""
    heads = [n for g in groups for n in g.tie.names if is_head(n) and n.endswith(".weight")]
    factor = head_scale(ctx.config)
    if factor is None and heads:
        raise MismatchError(
            "LT-420", "this model's head cannot be given weights of its own",
            file=ctx.checkpoint.path, key=heads[0],
            got="transformers 4 stops scaling the decoder's outputs then, transformers 5 does not",
            hint="--keep-tied changes the shared tensor; --skip leaves the module out",
        )  # fmt: skip
    return {} if factor in (None, 1.0) else {name: float(factor) for name in heads}
