"""What `extract` knows before it reads the first tensor byte."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loratool.dialects.base import Dialect
from loratool.dialects.programs import Program
from loratool.frozen import Frozen
from loratool.ops.access import Access
from loratool.ops.extract import ExtractPlan
from loratool.ops.inputs import OpenedBase


class ExtractJob(Frozen):
    """Two checkpoints, the plan for them, and what is to be written.

    Attributes:
        tuned: the fine-tune.
        base: what it was tuned from.
        target: folder to create.
        plan: what is factored and what is kept.
        criteria: of ranks, as they are reported and recorded.
        keep: what is stored whole.
        program: that the adapter is for; None = any.
        loader: the same if it takes files as its loader reads them.
        row: its dialect.
        access: how sources may be reached.
    """

    tuned: OpenedBase
    base: OpenedBase
    target: Path
    plan: ExtractPlan
    criteria: Mapping[str, Any]
    keep: Sequence[str]
    program: Program | None
    loader: Program | None
    row: Dialect
    access: Access

    @property
    def of_peft(self) -> Program | None:
        """The program, if it takes one rank and one α/r of all modules."""
        return self.program if self.loader is None else None
