"""A base as a merge sees it, which is not always as it lies there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loratool.frozen import Frozen, field
from loratool.store.checkpoint import Checkpoint


class Altered(Frozen):
    """A base whose codes are read as numbers, or with what it lacks and adapters bring.

    Attributes:
        checkpoint: the base; where its codes go, without their companions; under the names of the
            class that has a head if an adapter brings one.  What is new lies in its files.
        created: names of the new tensors.
        config_changes: key of the output's ``config.json`` -> value.
        notes: one sentence each.
        warnings: what the user should not overlook.
    """

    checkpoint: Checkpoint
    created: tuple[str, ...] = ()
    config_changes: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def then(self, later: Altered) -> Altered:
        """What was made of this one, with what there is to say of both."""
        return Altered(
            later.checkpoint, (*self.created, *later.created),
            {**self.config_changes, **later.config_changes},
            (*self.notes, *later.notes), (*self.warnings, *later.warnings),
        )  # fmt: skip
