"""A vocabulary that grows or shrinks: everything with one row or value per token follows it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loratool.adapter import Replacement, TensorData, TensorRef
from loratool.archs.stated import vocabulary_config
from loratool.archs.ties import follows_vocabulary, is_vocabulary_bias
from loratool.bind.items import BoundReplacement
from loratool.bind.place import Context
from loratool.bind.ties import Settled
from loratool.dialects.stated import NEW_TOKENS
from loratool.errors import MismatchError
from loratool.frozen import Frozen, field
from loratool.store.reader import read_bytes


class Resized(Frozen):
    """What follows from another number of tokens.

    Attributes:
        replacements: biases that the adapter does not hold, cut or filled up with zeros.
        grown: table -> its rows, where the adapter brings some more.
        config_changes: changes to ``config.json``.
        notes: one sentence each.
    """

    replacements: tuple[BoundReplacement, ...] = ()
    grown: Mapping[str, int] = field(default_factory=dict)
    config_changes: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def follow_vocabulary(settled: Settled, ctx: Context) -> Resized:
    """Let the whole base follow where the adapter replaces tensors by ones of other height.

    Raises:
        MismatchError: LT-443, rows are missing that only the adapter could bring.
    """
    tensors = ctx.checkpoint.tensors
    sources = {**{name: name for name in tensors}, **settled.new_tensors}
    given: dict[str, int] = {}
    grown: dict[str, int] = {}
    bound = [b for f in settled.found if (b := f.replacement) is not None]
    for target, new in ((b.target, b.replacement) for b in bound):
        size = _height(new.source.shape) if new.rows is None else max(new.rows) + 1
        old_size = _height(tensors[sources[target]].shape)
        if new.rows is None and size != old_size:
            given[target] = size
        elif new.origin in NEW_TOKENS and size > old_size:
            grown[target] = size
    given |= grown
    if not given:
        return Resized()
    old = {_height(tensors[sources[name]].shape) for name in given}
    followers = {
        name: tensors[source] for name, source in sources.items()
        if name not in given and follows_vocabulary(name) and _height(tensors[source].shape) in old
    }  # fmt: skip
    tables = sorted(name for name in followers if not is_vocabulary_bias(name))
    if tables or len(set(given.values())) > 1:
        raise MismatchError(
            "LT-443",
            "only some of the tensors over the vocabulary get the new size",
            key=", ".join(f"{name} ({size})" for name, size in sorted(given.items())),
            expected=f"the same number of rows in {', '.join(tables or sorted(given))}",
            hint="the adapter must hold every resized tensor",
        )
    size = next(iter(given.values()))
    biases = {name: ref for name, ref in followers.items() if is_vocabulary_bias(name)}
    keys = vocabulary_config(ctx.config, old, size)
    before, after = max(old), size
    how = "filled up with zeros" if after > before else "cut"
    return Resized(
        tuple(_resize(name, ref, size) for name, ref in biases.items()),
        grown,
        keys,
        (
            f"the vocabulary changes from {before} to {after} tokens"
            + (f"; {', '.join(sorted(biases))} {how}" if biases else ""),
        ),
    )


def _height(shape: tuple[int, ...]) -> int:
    """Tokens of a table (V, d), of a bias (V) or (1, V)."""
    return shape[1] if len(shape) == 2 and shape[0] == 1 else shape[0] if shape else 0


def _resize(name: str, ref: TensorRef, size: int) -> BoundReplacement:
    """A bias of another length; new tokens get what transformers gives them: nothing."""
    shape = (*ref.shape[:-1], size)
    each = ref.nbytes // max(1, ref.numel)
    data = bytes(read_bytes(ref))[: size * each].ljust(size * each, b"\0")
    return BoundReplacement(
        Replacement(name, TensorData(name, ref.dtype, shape, data), "vocabulary"), name
    )
