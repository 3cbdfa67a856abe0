"""What `loratool.run` returns."""

from __future__ import annotations

from typing import Any, ClassVar

from loratool.frozen import Frozen, asdict
from loratool.report.base import Report, plain_json


class StepReport(Frozen):
    """One step of a recipe.

    Attributes:
        number: from 1.
        command: what ran.
        line: in the recipe.
        output: what it wrote, None if nothing.
        report: its own report; None if it was not planned because an input is still missing.
        waits_for: with ``dry_run``, steps whose output it reads.
        seconds: wall time.
        was_made: an interrupted run of the recipe had made its output; nothing ran.
    """

    number: int
    command: str
    line: int
    output: str | None
    report: Report | None
    waits_for: tuple[int, ...] = ()
    seconds: float = 0.0
    was_made: bool = False


class RunReport(Report):
    """Result of `loratool.run`.

    Attributes:
        recipe: the file.
        steps: in order.
        seconds: wall time.
        dry_run: nothing was written.
    """

    command: ClassVar[str] = "run"
    recipe: str
    steps: tuple[StepReport, ...]
    seconds: float
    dry_run: bool = False

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON types, with each step's own."""
        steps = [
            {**plain_json({k: v for k, v in asdict(s).items() if k != "report"}),
             "report": None if s.report is None else s.report.to_json()}
            for s in self.steps
        ]  # fmt: skip
        head = super().to_json()
        return {**head, "steps": steps}
