"""What `loratool.push` returns."""

from __future__ import annotations

from typing import ClassVar

from loratool.frozen import Frozen
from loratool.report.base import Report


class PushedFile(Frozen):
    """A file of the repository, its size, and whether it differs from what was there."""

    name: str
    size: int
    changed: bool


class PushReport(Report):
    """Result of `loratool.push`.

    Attributes:
        repo: ``owner/name``.
        branch: where the commit went; with a pull request, what it asks to change.
        what: ``adapter`` or ``checkpoint``.
        commit: the commit that holds the files, None with ``dry_run``.
        created: the repository did not exist.
        private: visibility of a repository that was created; None = it existed, unchanged.
        files: what is published.
        deleted: stale shards that the commit deletes.
        pull_request: address, None for a commit to the branch.
        card: text of the model card.
        notes: what is good to know.
        dry_run: nothing was created or sent.
    """

    command: ClassVar[str] = "push"
    repo: str
    branch: str
    what: str
    commit: str | None
    created: bool
    private: bool | None
    files: tuple[PushedFile, ...]
    deleted: tuple[str, ...] = ()
    pull_request: str | None = None
    card: str = ""
    notes: tuple[str, ...] = ()
    dry_run: bool = False
