"""The address of an output in an object store, ``s3://bucket/folder``, as a path.

It has names, parents and suffixes as any path has; nothing of it lies on this machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from loratool.errors import OutputError, UsageError
from loratool.lazy import regex

if TYPE_CHECKING:
    _Path = Path
else:
    _Path = type(Path())

_SCHEME = regex(r"[a-z][a-z0-9+.-]+:")
_NO_STORES = ("data", "file", "hf", "http", "https", "local")
"""Schemes of fsspec's that are a disk, the Hub (``loratool push``), or read alone."""


class Address(_Path):
    """Of a folder or a file in a store that one of fsspec's drivers reaches."""

    def __str__(self) -> str:
        scheme, *rest = self.parts
        return f"{scheme}//{'/'.join(rest)}"

    @property
    def scheme(self) -> str:
        """What tells the driver, such as ``s3``."""
        return self.parts[0].rstrip(":")


def place_of(output: str | Path) -> Path:
    """What was typed as an output: a path, an `Address` where fsspec knows the scheme.

    A folder of this machine that has such a name wins.

    Raises:
        UsageError: LT-264, a password in it.
        OutputError: LT-510, no more than a bucket, or ``..`` in it.
    """
    path = Path(output)
    if isinstance(output, Address) or not _is_of_store(path):
        return output if isinstance(output, Address) else path
    place = Address(*path.parts)
    login, at, _ = path.parts[1].partition("@") if len(path.parts) > 1 else ("", "", "")
    if at and ":" in login:
        raise UsageError(
            "LT-264", "this looks like a password, which does not belong on a command line",
            hint="the driver takes it from its own variables or files; and change this password",
        )  # fmt: skip
    if len(path.parts) < 3 or ".." in path.parts:
        raise OutputError(
            "LT-510", "the output needs a name of its own", file=place,
            hint="such as s3://bucket/folder",
        )  # fmt: skip
    return place


def _is_of_store(path: Path) -> bool:
    if not path.parts or not _SCHEME.fullmatch(path.parts[0]) or Path(path.parts[0]).exists():
        return False
    from fsspec.registry import known_implementations, registry

    scheme = path.parts[0].rstrip(":")
    return scheme not in _NO_STORES and (scheme in known_implementations or scheme in registry)
