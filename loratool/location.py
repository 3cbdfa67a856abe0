"""Where a file is: on this machine, on the Hub, or in an object store."""

from __future__ import annotations

from pathlib import Path

from loratool.errors import BadFileError
from loratool.frozen import Frozen

STAYS = "stub"
"""The field that means nothing on another machine."""


class RemoteFile(Frozen):
    """A file on the Hub or in an object store, which is read in place.

    Attributes:
        root: ``hf://owner/name@commit``, or the address of a folder in a store.
        name: path inside of it.
        size: bytes.
        digest: sha256 of the content (LFS), or the git blob id of a small file; "" in a store.
        tag: in a store what changes with the content, "" if it tells none.
        stub: what stands for it on this machine and holds its header; None on any other.
    """

    root: str
    name: str
    size: int
    digest: str = ""
    tag: str = ""
    stub: Path | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemoteFile) and self._told == other._told

    def __hash__(self) -> int:
        return hash(self._told)

    def __str__(self) -> str:
        return f"{self.root}/{self.name}"

    @property
    def _told(self) -> tuple[object, ...]:
        """All of it but the stub."""
        return self.root, self.name, self.size, self.digest, self.tag

    @property
    def path(self) -> Path:
        """Its stub, or what that would be called."""
        return self.stub or Path(self.name)

    @property
    def is_on_hub(self) -> bool:
        """True for a file of a commit, which never changes; False for an object in a store."""
        return self.root.startswith("hf://")

    @property
    def content(self) -> str:
        """The same for files only if their bytes are; "" if nothing tells."""
        return self.digest or (f"{self} {self.tag}" if self.tag else "")

    @property
    def stamp(self) -> tuple[int, int, int, int, int]:
        """What it was when it was listed, in the form of `loratool.adapter.Stamp`."""
        import hashlib

        told = hashlib.sha256((self.digest or self.tag).encode()).digest()
        return 0, 0, self.size, int.from_bytes(told[:7], "big"), 0


Location = Path | RemoteFile


def path_of(file: Location) -> Path:
    """A file of this machine, or the stub of a remote one."""
    return file if isinstance(file, Path) else file.path


def changed(path: Location) -> BadFileError:
    """The error for a file that is not what it was."""
    return BadFileError(
        "LT-332", "input changed during the run", file=path,
        hint="run it again when nothing writes to it, links it or changes its permissions",
    )  # fmt: skip


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


def last_name(path: Path) -> str:
    """The last part of a path; of ``.`` and ``..`` that of the folder that they are."""
    return path.resolve().name if path.name in ("", "..") else path.name
