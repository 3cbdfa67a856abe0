"""An address in an object store, ``s3://bucket/folder``, as a path.

It has names, parents and suffixes as any path has; nothing of it lies on this machine.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from loratool.errors import BadFileError, OutputError, UsageError
from loratool.lazy import regex

if TYPE_CHECKING:
    _Path = Path
else:
    _Path = type(Path())

_PAGE = regex(
    r"https?://(www\.)?(huggingface\.co|hf\.co)/(?P<repo>[\w.-]+/[\w.-]+)"
    r"(/(blob|resolve|tree)/(?P<rev>[^/?#]+)(?P<sub>/[^?#]*?)?)?/?([?#].*)?"
)
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

    def overlaps(self, other: Address) -> bool:
        """True if one is, or lies in, the other, by whichever name of the driver."""
        from fsspec.registry import known_implementations

        mine, theirs = (known_implementations.get(one.scheme, {}).get("class", one.scheme)
                        for one in (self, other))  # fmt: skip
        count = min(len(self.parts), len(other.parts))
        return mine == theirs and self.parts[1:count] == other.parts[1:count]


def place_of(output: str | Path) -> Path:
    """What was typed as an output: a path, an `Address` where fsspec knows the scheme.

    Raises:
        UsageError: LT-264, a password in it.
        OutputError: LT-510, no more than a bucket, or ``..`` in it.
    """
    place = address_of(output)
    if place is not None and (len(place.parts) < 3 or ".." in place.parts):
        raise OutputError(
            "LT-510", "the output needs a name of its own", file=place,
            hint="such as s3://bucket/folder",
        )  # fmt: skip
    return place or Path(output)


def address_of(text: str | Path) -> Address | None:
    """What was typed, where fsspec knows the scheme; a folder of this machine of that name wins.

    Raises:
        UsageError: LT-264, a password in it.
    """
    path = Path(text)
    if isinstance(text, Address) or not _is_of_store(path):
        return text if isinstance(text, Address) else None
    login, at, _ = path.parts[1].partition("@") if len(path.parts) > 1 else ("", "", "")
    if at and ":" in login:
        raise UsageError(
            "LT-264", "this looks like a password, which does not belong on a command line",
            hint="the driver takes it from its own variables or files; and change this password",
        )  # fmt: skip
    return Address(*path.parts)


def meant_by(text: str) -> str | None:
    """A hint for a web address of the Hub or a ``file://`` one; None for any other."""
    found = unquote(text.removeprefix("file://")) if text.startswith("file:///") else ""
    if page := _PAGE.fullmatch(text):
        revision = "" if page["rev"] in (None, "main") else f"@{page['rev']}"
        found = f"hf://{page['repo']}{revision}{(page['sub'] or '').rstrip('/')}"
    return f"did you mean {shlex.quote(found)}?" if found else None


def refuse_elsewhere(path: Path) -> None:
    """Refuse a small file that is not of this machine, by the address that was typed.

    Raises:
        BadFileError: LT-300.
    """
    if _has_scheme(path):
        raise BadFileError("LT-300", "this file must lie here", file=Address(*path.parts),
                           hint="fetch it first")  # fmt: skip


def _has_scheme(path: Path) -> bool:
    first = path.parts[0] if path.parts else ""
    return _SCHEME.fullmatch(first) is not None and not Path(first).exists()


def _is_of_store(path: Path) -> bool:
    if not _has_scheme(path):
        return False
    from fsspec.registry import known_implementations, registry

    scheme = path.parts[0].rstrip(":")
    return scheme not in _NO_STORES and (scheme in known_implementations or scheme in registry)
