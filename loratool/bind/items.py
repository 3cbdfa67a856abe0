"""What binding takes and gives: plain data, shared by the modules that do it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loratool.adapter import DeltaSpec, Replacement, TensorRef
from loratool.archs.flat import Meaning
from loratool.dialects.stated import NEW_TOKENS
from loratool.frozen import Frozen, field
from loratool.plan import Region
from loratool.store.checkpoint import Checkpoint


class BoundDelta(Frozen):
    """A delta (or a slice of one) and the base tensor that it changes.

    Attributes:
        spec: the delta.
        target: checkpoint-wide tensor name, or the name of a `Bindings.new_tensors` entry.
        region: where in the target's 2-D view, and which part of the delta.
        expert: expert index for flattened 3-D factors, else None.
        transposed: the target stores (in, out).
    """

    spec: DeltaSpec
    target: str
    region: Region = field(default_factory=Region)
    expert: int | None = None
    transposed: bool = False


class BoundReplacement(Frozen):
    """A replacement tensor and the base tensor that it replaces (or creates).

    Attributes:
        replacement: as the target has it.
        target: checkpoint-wide tensor name.
        old: what it replaces as the adapter has it, where the target is of another form.
    """

    replacement: Replacement
    target: str
    old: TensorRef | None = None


class Bindings(Frozen):
    """The result of `bind`.

    Attributes:
        deltas: every delta with its target; a delta may appear for several targets.
        replacements: every replacement with its target.
        new_tensors: new tensor name -> base tensor whose values it starts from
            (``lm_head.weight`` -> ``model.embed_tokens.weight`` when untied).
        grown: table -> its rows, more than in the base, those of new tokens included.
        created: name of a tensor that the base lacks -> (name in the adapter, the tensor).
        config_changes: changes to ``config.json``: key (dotted for nested) -> value.
        scales: tensor -> factor of the finished sum; 1 where it is not listed.
        rule: how names were matched, in words (``exact``, ``+ prefix "model."``).
        skipped: modules left out because the user asked for it.
        notes: one sentence each.
        checkpoint: the base that the targets name: the one given, or its virtual copy with
            replicated layers.  None only where a caller builds bindings by hand.
    """

    deltas: tuple[BoundDelta, ...]
    replacements: tuple[BoundReplacement, ...] = ()
    new_tensors: Mapping[str, str] = field(default_factory=dict)
    grown: Mapping[str, int] = field(default_factory=dict)
    created: Mapping[str, tuple[str, TensorRef]] = field(default_factory=dict)
    config_changes: Mapping[str, Any] = field(default_factory=dict)
    scales: Mapping[str, float] = field(default_factory=dict)
    rule: str = "exact"
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    checkpoint: Checkpoint | None = None


class Item(Frozen):
    """One thing of an adapter that needs a target: a delta or a replacement.

    Attributes:
        names: full parameter name after ``--rename``; further ones for a bare parameter whose
            name the adapter's key does not tell.
        module: module path as the adapter has it, for messages.
        spec: the delta, or None.
        replacement: the replacement, or None.
        pieces: where its rows lie: in several tensors, in a part of one, or in another order.
        is_translated: the base has another name for it.
        old: as of `BoundReplacement`.
    """

    names: tuple[str, ...]
    module: str
    spec: DeltaSpec | None = None
    replacement: Replacement | None = None
    pieces: Meaning | None = None
    is_translated: bool = False
    old: TensorRef | None = None

    @property
    def name(self) -> str:
        """The likeliest full name."""
        return self.names[0]

    @property
    def label(self) -> str:
        """Full name as the adapter has it, before ``--rename``."""
        if self.spec is not None:
            return self.spec.name
        return self.replacement.name if self.replacement is not None else self.name

    @property
    def is_tokens(self) -> bool:
        """True for rows, which PEFT itself applies to both tied tensors."""
        rows = ("trainable_tokens", *NEW_TOKENS)
        return self.replacement is not None and self.replacement.origin in rows

    @property
    def is_new_tokens(self) -> bool:
        """True for rows of tokens that the base may lack."""
        return self.replacement is not None and self.replacement.origin in NEW_TOKENS


class Found(Frozen):
    """An item with its targets.

    Attributes:
        item: what was placed.
        deltas: for a delta, the pieces.
        replacement: for a replacement, the target.
        alias: the name of a tied tensor that the files lack, where the item asked for that; "" when
            it named the stored one.
        created: for a part that the base lacks, its name in the output.
    """

    item: Item
    deltas: tuple[BoundDelta, ...] = ()
    replacement: BoundReplacement | None = None
    alias: str = ""
    created: str = ""

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the tensors that change."""
        if self.replacement is not None:
            return (self.replacement.target,)
        return tuple(d.target for d in self.deltas)


class Misfit(Frozen):
    """An item that a rule cannot place.

    Attributes:
        item: what was not placed.
        reason: ``name`` when the base has no such tensor, else the code of the error
            (``LT-432`` …).
        expected: what the base has.
        got: what the adapter brings.
    """

    item: Item
    reason: str
    expected: str = ""
    got: str = ""
    target: str = ""
