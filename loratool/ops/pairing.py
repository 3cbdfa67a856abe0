"""Which tensor of a fine-tune belongs to which of its base, and under which names it is written."""

from __future__ import annotations

from collections.abc import Mapping

from loratool.archs.heads import is_other_head, is_pooler, task_of
from loratool.archs.ties import Tie, find_ties, head_scale, is_head, tied_tensors
from loratool.errors import MismatchError, list_some
from loratool.frozen import Frozen, field
from loratool.ops.align import align_names, renamed
from loratool.ops.extract_pairs import Pair, Roles
from loratool.report.text import plural
from loratool.store.checkpoint import Checkpoint


class Pairing(Frozen):
    """The tensors of a fine-tune beside those of its base.

    Attributes:
        matched: those that both have, of one shape.
        created: those that only the fine-tune has, or has in another height.
        absent: heads of the base that the fine-tune lacks.
        places: pair -> on-disk names under which it is written, where that is not its own: PEFT
            adapts every module of a tied tensor by itself.
        notes: one sentence each.
    """

    matched: tuple[Pair, ...]
    created: tuple[Pair, ...]
    absent: tuple[str, ...] = ()
    places: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def pair_tensors(tuned: Checkpoint, base: Checkpoint, names: str) -> Pairing:
    """Give every tensor of a fine-tune its partner.

    Args:
        tuned: the fine-tune.
        base: what it was tuned from.
        names: ``v5`` or ``v4``, as the adapter will call them.

    Raises:
        MismatchError: LT-481 body tensors are missing, LT-482 shapes differ, LT-487 the scale of
            the head differs.
    """
    ties = find_ties(base)
    _check_scale(ties, tuned, base)
    roles = Roles(base, names)
    aligned = align_names(tuned, base)
    called = dict(zip(aligned, tuned.tensors, strict=True))
    notes = [
        plural(
            renamed(aligned),
            "tensor goes by another name in the fine-tune",
            "tensors go by other names in the fine-tune",
        )
    ] * (renamed(aligned) > 0)
    theirs = {name: tie.stored[0] for tie in find_ties(tuned) for name in tie.missing}
    ours = {name: tie.stored[0] for tie in ties for name in tie.missing}
    for name in base.tensors:  # stored twice in the base, once in the fine-tune
        if name not in aligned and theirs.get(name) in aligned:
            aligned[name] = aligned[theirs[name]]
    heads = {n for tie in ties for n in tie.names if is_head(n) and n.endswith(".weight")}
    matched: list[Pair] = []
    created: list[Pair] = []
    shapes: list[str] = []
    for name, ref in aligned.items():
        other = base.tensors.get(name)
        if other is None and name in ours:
            other = base.tensors[ours[name]]
            notes.append(f"{name} is tied in the base: compared with {ours[name]}")
        role, holder = roles.of(name, ref, other)
        role = "head" if name in heads else role
        if other is None:
            created.append(Pair(name, None, ref, role))
        elif other.shape == ref.shape:
            matched.append(Pair(name, other, ref, role, holder))
        elif role in ("embedding", "head") and other.shape[1:] == ref.shape[1:]:
            created.append(Pair(name, other, ref, role))
            notes.append(f"{name} has {ref.shape[0] - other.shape[0]:+d} rows")
        elif is_other_head(name):
            created.append(Pair(name, None, ref, role))
            notes.append(f"{name} has another size: {list(other.shape)} → {list(ref.shape)}")
        else:
            shapes.append(f"{name} {list(other.shape)} → {list(ref.shape)}")
    absent = _absent([n for n in base.tensors if n not in aligned], tuned)
    if shapes:
        raise MismatchError(
            "LT-482", "tensors have different shapes", file=tuned.path, key=list_some(shapes)
        )
    places = _places(ties, called, tuned)
    return Pairing(tuple(matched), tuple(created), absent, places, tuple(notes))


def _absent(missing: list[str], tuned: Checkpoint) -> tuple[str, ...]:
    """Heads that another class does not have; anything else must be there."""
    twins = tied_tensors(tuned)
    lost = [n for n in missing if n not in twins]
    body = [n for n in lost if not (is_other_head(n) or is_pooler(n))]
    if body:
        raise MismatchError(
            "LT-481",
            f"{plural(len(body), 'tensor')} of the base missing from the fine-tune",
            file=tuned.path,
            key=list_some(body),
            hint="are these checkpoints of one model?",
        )
    return tuple(lost)


def _places(
    ties: tuple[Tie, ...], called: Mapping[str, str], tuned: Checkpoint
) -> dict[str, tuple[str, ...]]:
    """Every living name of a tied tensor that the fine-tune does not store apart.

    Where the fine-tune has a head of its own, names are those of its class.
    """
    task = task_of(tuned.config)
    found: dict[str, tuple[str, ...]] = {
        name: (own,) for name, own in called.items() if task and own != name
    }
    for tie in ties:
        stored = next((n for n in tie.stored if n in called), None)
        if stored is None:
            continue
        others = [n for n in tie.live if n == stored or n not in called]
        others.sort(key=lambda n: is_head(n) != is_head(stored))  # as it is factored, then turned
        found[stored] = tuple(_like(n, stored, found) for n in others) or (stored,)
    return found


def _like(name: str, stored: str, found: Mapping[str, tuple[str, ...]]) -> str:
    """The name of a tied tensor with the outer module that the stored one has in the fine-tune."""
    (other,) = found.get(stored, (stored,))[:1]
    if other.endswith(stored):
        return other.removesuffix(stored) + name
    return name.removeprefix(stored.removesuffix(other)) if stored.endswith(other) else name


def _check_scale(ties: tuple[Tie, ...], tuned: Checkpoint, base: Checkpoint) -> None:
    """A T5 multiplies its decoder's outputs only while head and embedding are tied."""
    heads = {n for tie in ties for n in tie.names if is_head(n)}
    still = {n for tie in find_ties(tuned) for n in tie.names}
    apart = sorted(n for n in heads - still if n in tuned.tensors)
    if apart and head_scale(base.config) != 1.0:
        raise MismatchError(
            "LT-487", "the head is tied and scaled in the base, and neither in the fine-tune",
            file=tuned.path, key=apart[0], hint="compare it with a base of its own form",
        )  # fmt: skip
