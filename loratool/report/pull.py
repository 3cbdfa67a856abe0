"""What `loratool.pull` returns."""

from __future__ import annotations

from typing import Any, ClassVar

from loratool.frozen import Frozen
from loratool.report.base import Report


class PulledFile(Frozen):
    """A file, its size, and the hash that it was checked against (sha256 or git blob id)."""

    name: str
    size: int
    digest: str


class PulledAdapter(Frozen):
    """An adapter of the repository.

    Attributes:
        place: its folder or file in the repository, "" for the top.
        base_model: the base that its configuration names; it is not fetched.
    """

    place: str
    base_model: str | None = None


class PullReport(Report):
    """Result of `loratool.pull`.

    Attributes:
        repo: ``owner/name``.
        commit: the commit that all files are of.
        output: folder that holds them, None with ``dry_run``.
        files: what was fetched, or is there.
        adapters: those among the files.
        others: folders of the repository with adapters that were not asked for.
        dry_run: nothing was fetched.
        is_current: the output held exactly these files, and nothing was fetched.
    """

    command: ClassVar[str] = "pull"
    repo: str
    commit: str
    output: str | None
    files: tuple[PulledFile, ...]
    adapters: tuple[PulledAdapter, ...] = ()
    others: tuple[str, ...] = ()
    dry_run: bool = False
    is_current: bool = False

    @property
    def base_model(self) -> str | None:
        """The base that all adapters name, None if they differ or name none."""
        named = {a.base_model for a in self.adapters}
        return named.pop() if len(named) == 1 else None

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON types, with ``base_model``."""
        return super().to_json() | {"base_model": self.base_model}
