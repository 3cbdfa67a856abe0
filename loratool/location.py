"""Where a file is: on this machine, or on the Hub."""

from __future__ import annotations

from pathlib import Path

from loratool.frozen import Frozen

STAYS = "stub"
"""The field that means nothing on another machine."""


class HubFile(Frozen):
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
    stub: Path | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HubFile) and self._told == other._told

    def __hash__(self) -> int:
        return hash(self._told)

    def __str__(self) -> str:
        return f"hf://{self.repo_id}@{self.commit}/{self.name}"

    @property
    def _told(self) -> tuple[object, ...]:
        """All of it but the stub."""
        return self.repo_id, self.commit, self.name, self.size, self.digest

    @property
    def path(self) -> Path:
        """Its stub, or what that would be called."""
        return self.stub or Path(self.name)


Location = Path | HubFile


def path_of(file: Location) -> Path:
    """A file of this machine, or the stub of one on the Hub."""
    return file if isinstance(file, Path) else file.path


class HubReference(Frozen):
    """``hf://owner/name[@revision][/sub/path]``, taken apart.

    Attributes:
        repo_id: ``owner/name``.
        revision: decoded; None = the default branch.
        sub: path inside the repository, "" for its root.
    """

    repo_id: str
    revision: str | None
    sub: str = ""
