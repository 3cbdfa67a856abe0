"""Where a file is: on this machine, or on the Hub."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

STAYS = "stays"
"""Metadata of fields that mean nothing on another machine."""


@dataclass(frozen=True)
class HubFile:
    """A file of one commit of a repository, which is read in place.

    Attributes:
        repo_id: ``owner/name``.
        commit: full sha.
        name: path inside the repository.
        size: bytes.
        digest: sha256 of the content (LFS), or the git blob id of a small file.
        stub: what stands for it on this machine and holds its header; None on any other.
    """

    repo_id: str
    commit: str
    name: str
    size: int
    digest: str
    stub: Path | None = field(default=None, compare=False, repr=False, metadata={STAYS: True})

    def __str__(self) -> str:
        return f"hf://{self.repo_id}@{self.commit}/{self.name}"

    @property
    def path(self) -> Path:
        """Its stub, or what that would be called."""
        return self.stub or Path(self.name)


Location = Path | HubFile


def path_of(file: Location) -> Path:
    """A file of this machine, or the stub of one on the Hub."""
    return file if isinstance(file, Path) else file.path


@dataclass(frozen=True)
class HubReference:
    """``hf://owner/name[@revision][/sub/path]``, taken apart.

    Attributes:
        repo_id: ``owner/name``.
        revision: decoded; None = the default branch.
        sub: path inside the repository, "" for its root.
    """

    repo_id: str
    revision: str | None
    sub: str = ""
