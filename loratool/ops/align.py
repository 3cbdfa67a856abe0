"""Which tensor of a fine-tune is which of its base, where the two were saved in other forms.

All that binding an adapter knows about names helps here too: wrappers of training, renames of
transformers, outer modules, the user's ``--rename``.  Experts that one side stores together and
the other one by one are compared one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from loratool.adapter import TensorRef
from loratool.archs.experts import expert_names, parse_expert
from loratool.archs.layers import experts_lie_turned
from loratool.archs.names import to_memory
from loratool.archs.stated import model_type
from loratool.bind.names import name_rules
from loratool.bind.seen import Seen, in_layout_of
from loratool.bind.user_names import parse_rename
from loratool.dialects.peft.keys import strip_parallel, without_wrappers
from loratool.errors import list_some
from loratool.frozen import replace
from loratool.report.text import plural
from loratool.store.checkpoint import Checkpoint


def same_form(
    tuned: Checkpoint, base: Checkpoint, rename: Sequence[str] = ()
) -> tuple[Checkpoint, Checkpoint, list[str]]:
    """Both checkpoints with the tensors that can be compared, and notes.

    Args:
        tuned: the fine-tune, or what a merge made.
        base: what it stems from.
        rename: ``s/a/b/`` expressions on names of ``tuned``.

    Raises:
        UsageError: LT-240, LT-241: an expression that is none.
    """
    notes: list[str] = []
    tensors, ours = _without_wrappers(tuned.tensors), _without_wrappers(base.tensors)
    if list(tensors) != list(tuned.tensors) or list(ours) != list(base.tensors):
        notes.append("names of torch.compile, FSDP or DataParallel wrappers were removed")
    for text in rename:
        names = parse_rename(text).apply(list(tensors))
        if names == list(tensors):
            notes.append(f"--rename {text} changed no name")
        tensors = dict(zip(names, tensors.values(), strict=True))
    tuned = replace(tuned, tensors=tensors)
    base = replace(base, tensors=ours)
    seen = in_layout_of(tuned, base)
    if seen is not None:
        notes += _of_layout(seen)
        left = {*seen.unnamed, *(name for names in seen.absent.values() for name in names)}
        tuned = replace(tuned, tensors=seen.tensors)
        base = replace(base, tensors={n: r for n, r in base.tensors.items() if n not in left})
    split_tuned, count = _split_experts(tuned, base)
    split_base, other = _split_experts(base, tuned)
    if count + other:
        side = "the fine-tune" if count else "the base"
        notes.append(f"experts that {side} stores together are compared one by one")
    return split_tuned, split_base, notes


def _of_layout(seen: Seen) -> Iterator[str]:
    if seen.unnamed:
        yield (f"{plural(len(seen.unnamed), 'tensor')} of the base not compared, whose names in"
               f" the other layout are not known: {list_some(seen.unnamed)}")  # fmt: skip
    for part, names in seen.absent.items():
        yield (f"{plural(len(names), 'tensor')} of the base not compared: the fine-tune has"
               f" nothing of {part}, such as {names[0]}")  # fmt: skip


def align_names(tuned: Checkpoint, base: Checkpoint) -> dict[str, TensorRef]:
    """The tensors of ``tuned`` under the names that ``base`` has for them.

    Equal names first; then equal names in memory (transformers 4 and 5 spell some differently);
    then the one rule of binding that finds the most partners.  A name without a partner stays.

    Args:
        tuned: the fine-tune.
        base: what it was tuned from.
    """
    have = base.tensors
    loose = [name for name in tuned.tensors if name not in have]
    taken = set(tuned.tensors) - set(loose)
    found = _by_memory(loose, [n for n in have if n not in taken], model_type(base.config))
    taken |= set(found.values())
    found |= _by_rule([name for name in loose if name not in found], base, taken)
    return {found.get(name, name): ref for name, ref in tuned.tensors.items()}


def renamed(aligned: Mapping[str, TensorRef]) -> int:
    """How many tensors go under another name than their own."""
    return sum(not name.endswith(ref.name) for name, ref in aligned.items())


def _by_memory(loose: Iterable[str], free: Iterable[str], model_type: str) -> dict[str, str]:
    in_memory = {to_memory(model_type, name): name for name in free}
    found = {}
    for name in loose:
        partner = in_memory.get(to_memory(model_type, name))
        if partner is not None:
            found[name] = partner
    return found


def _by_rule(loose: list[str], base: Checkpoint, taken: set[str]) -> dict[str, str]:
    best: dict[str, str] = {}
    for rule in name_rules(base, loose) if loose else ():
        found: dict[str, str] = {}
        for name in loose:
            partner = rule.view.get(rule.rename(name))
            if partner is not None and partner not in taken:
                found[name] = partner
        if len(found) > len(best) and len(set(found.values())) == len(found):
            best = found
    return best


def _without_wrappers(tensors: Mapping[str, TensorRef]) -> dict[str, TensorRef]:
    """Names without what torch.compile, FSDP and DataParallel put into them."""
    names, _ = strip_parallel(without_wrappers(tensors))
    if len(set(names)) < len(names):
        return dict(tensors)
    return dict(zip(names, tensors.values(), strict=True))


def _split_experts(one: Checkpoint, other: Checkpoint) -> tuple[Checkpoint, int]:
    """Slices of tensors that hold every expert, where the other side has a tensor for each."""
    tensors: dict[str, TensorRef] = {}
    count = 0
    for name, ref in one.tensors.items():
        parts = dict(_slices(name, ref, other, one.config))
        tensors |= parts or {name: ref}
        count += bool(parts)
    return (replace(one, tensors=tensors), count) if count else (one, 0)


def _slices(
    name: str, ref: TensorRef, other: Checkpoint, config: Mapping[str, Any]
) -> Iterator[tuple[str, TensorRef]]:
    found = parse_expert(name)
    if found is None or found.expert is not None or len(ref.shape) != 3 or 0 in ref.shape:
        return
    if experts_lie_turned(config, name, ref.shape):
        return  # its slices are transposed, or not in one piece
    count, rows, cols = ref.shape
    if rows % len(found.parts) or ref.nbytes % count:
        return
    height = rows // len(found.parts)
    row_bytes = ref.nbytes // (count * rows)
    for expert in range(count):
        for position, part in enumerate(found.parts):
            target = _single_name(found.container, expert, part, other)
            if target is None:
                return
            first = expert * rows + position * height
            yield target, replace(
                ref, shape=(height, cols), start=ref.start + first * row_bytes,
                nbytes=height * row_bytes,
            )  # fmt: skip


def _single_name(container: str, expert: int, part: str, other: Checkpoint) -> str | None:
    """The other side's name for one part of one expert, if it has such a tensor."""
    containers = (container, container.replace(".mlp.", ".block_sparse_moe."),
                  container.replace(".block_sparse_moe.", ".mlp."))  # fmt: skip
    return next(
        (n for c in containers for n in expert_names(c, expert, part) if n in other.tensors), None
    )
