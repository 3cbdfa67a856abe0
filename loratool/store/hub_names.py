"""Files as a Hub lists them: names and sizes, before any becomes a path or is asked for."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from loratool.errors import HubError
from loratool.frozen import Frozen
from loratool.store.file_kinds import kind_of

if TYPE_CHECKING:
    from loratool.location import RemoteFile

_LONGEST = 1_024  # characters
_LONGEST_PART = 255  # bytes: what file systems can name
_NO_TEXT = ("Cc", "Cs")  # control characters, halves of pairs


class ListedFile(Frozen):
    """A file as the Hub lists it.

    Attributes:
        name: path inside the repository.
        size: bytes.
        digest: sha256 of the content (LFS), or the git blob id (SHA-1) of a small file.
    """

    name: str
    size: int
    digest: str


class Listing(Frozen):
    """The files of one commit, the revision that led to it, and their folder if cached."""

    repo_id: str
    revision: str | None
    commit: str
    files: tuple[ListedFile, ...]
    cached: Path | None = None


def check_names(repo_id: str, names: Sequence[str]) -> None:
    """Refuse what no repository can hold.

    Raises:
        HubError: LT-721, a name that leads astray, cannot be written, or stands there twice.
    """
    for name in names:
        if is_bad(name):
            raise astray(repo_id, name, "a name inside the repository")
    # Ordered so that what lies in a folder comes right after a file of the folder's name.
    ordered = sorted(name.replace("/", "\0") for name in names)
    for one, other in pairwise(ordered):
        if other == one or other.startswith(f"{one}\0"):
            raise astray(repo_id, one.replace("\0", "/"), "every name once")


def is_bad(name: str) -> bool:
    """True for what can be no name of a file in a folder."""
    if name.isascii() and name.isprintable() and len(name) <= _LONGEST_PART:
        return bool({"", ".", ".."} & set(name.split("/")))
    return (
        len(name) > _LONGEST
        or any(unicodedata.category(char) in _NO_TEXT for char in name)
        or any(
            part in ("", ".", "..") or len(part.encode()) > _LONGEST_PART
            for part in name.split("/")
        )
    )


def refuse_large(repo_id: str, file: ListedFile | RemoteFile) -> None:
    """Refuse a small file that is listed larger than one of its kind can be.

    Raises:
        HubError: LT-727.
    """
    kind = kind_of(file.name)
    if kind is not None and kind.most_bytes is not None and file.size > kind.most_bytes:
        raise HubError(
            "LT-727", "a small file that is not small", file=repo_id, key=ascii(file.name)[1:-1],
            expected=f"at most {kind.most_bytes:,} bytes", got=f"{file.size:,} bytes",
        )  # fmt: skip


def astray(repo_id: str, name: str, expected: str) -> HubError:
    """The error for a listed file that cannot be used."""
    return HubError(
        "LT-721", "the Hub lists a file that cannot be used", file=repo_id,
        expected=expected, got=ascii(name[:_LONGEST])[1:-1],
        hint="check HF_ENDPOINT: a mirror must list what the Hub lists",
    )  # fmt: skip
