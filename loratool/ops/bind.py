"""Which tensor of the base does each delta of an adapter change?

CONTRACT (the dataclasses below are fixed; `bind` is to be written).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from loratool.adapter import DeltaSpec, Replacement
from loratool.plan import Region


@dataclass(frozen=True)
class BindOptions:
    """What the user says about names.

    Attributes:
        rename: ``s/pattern/replacement/`` expressions, applied in order to module names.
        skip: component names (``te``) or regular expressions; matching modules are left out.
        allow_unmatched: leave out and report what has no target.
        untie: write an own lm_head where it shares the embedding.
        keep_tied: apply a change of one tied tensor to the shared tensor.
        resize_embeddings: let replacement tensors change the vocabulary size.
    """

    rename: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    allow_unmatched: bool = False
    untie: bool = False
    keep_tied: bool = False
    resize_embeddings: bool = False


@dataclass(frozen=True)
class BoundDelta:
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
    region: Region = Region()
    expert: int | None = None
    transposed: bool = False


@dataclass(frozen=True)
class BoundReplacement:
    """A replacement tensor and the base tensor that it replaces (or creates)."""

    replacement: Replacement
    target: str


@dataclass(frozen=True)
class Bindings:
    """The result of `bind`.

    Attributes:
        deltas: every delta with its target; a delta may appear for several targets.
        replacements: every replacement with its target.
        new_tensors: new tensor name -> base tensor whose values it starts from
            (``lm_head.weight`` -> ``model.embed_tokens.weight`` when untied).
        config_changes: changes to ``config.json``: key (dotted for nested) -> value.
        rule: how names were matched, in words (``exact``, ``+ prefix "model."``).
        skipped: modules left out because the user asked for it.
        notes: one sentence each.
    """

    deltas: tuple[BoundDelta, ...]
    replacements: tuple[BoundReplacement, ...] = ()
    new_tensors: Mapping[str, str] = field(default_factory=dict)
    config_changes: Mapping[str, Any] = field(default_factory=dict)
    rule: str = "exact"
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
