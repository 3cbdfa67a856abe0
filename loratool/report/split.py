"""What `loratool.split` returns."""

from __future__ import annotations

from typing import Any, ClassVar

from loratool.frozen import asdict
from loratool.report.base import SCHEMA, Loads, Report, plain_json
from loratool.report.merge import MergeReport


class SplitReport(Report):
    """Result of `loratool.split`.

    Attributes:
        output: the folder.
        adapter: what was (or would be) written of the adapter.
        base: likewise of its base.
        moved: names of what went into the base.
        modules: changes that are left in the adapter.
        adapter_bytes: size of its tensor file; 0 where nothing was written.
        merged: of the base; None if an interrupted run had made it.
        loads_in: which programs load the adapter.
        seconds: wall time.
        dry_run: nothing was written.
    """

    command: ClassVar[str] = "split"
    output: str
    adapter: str
    base: str
    moved: tuple[str, ...]
    modules: int
    adapter_bytes: int
    merged: MergeReport | None
    loads_in: tuple[Loads, ...]
    seconds: float
    dry_run: bool = False

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON types, with that of the base."""
        head = {"schema": SCHEMA, "command": self.command, "ok": self.ok}
        own = {k: plain_json(v) for k, v in asdict(self).items() if k != "merged"}
        return {**head, **own, "merged": self.merged and self.merged.to_json()}
