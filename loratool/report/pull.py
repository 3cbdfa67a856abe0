"""What `loratool.pull` returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from loratool.report.base import Report


@dataclass(frozen=True)
class PulledFile:
    """A file, its size, and the hash that it was checked against (sha256 or git blob id)."""

    name: str
    size: int
    digest: str


@dataclass(frozen=True)
class PullReport(Report):
    """Result of `loratool.pull`.

    Attributes:
        repo: ``owner/name``.
        commit: the commit that all files are of.
        output: folder that holds them, None with ``dry_run``.
        files: what was fetched, or is there.
        base_model: the base that the adapter names; it is not fetched.
        dry_run: nothing was fetched.
        is_current: the output held exactly these files, and nothing was fetched.
    """

    command: ClassVar[str] = "pull"
    repo: str
    commit: str
    output: str | None
    files: tuple[PulledFile, ...]
    base_model: str | None = None
    dry_run: bool = False
    is_current: bool = False
