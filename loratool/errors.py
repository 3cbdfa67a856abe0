"""Every way a command can fail, with its exit code.

A message always has the same form::

    error[LT-nnn]: <what> · file <path> · key <key> · expected <x> · got <y> · hint <command>

The first digit of a number is the exit code (``LT-1nn`` is exit code 10).  ``docs/errors.md``
lists every number; a test checks it against the raise sites.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Any, ClassVar, Self

from loratool.lazy import regex

TOKEN = regex(r"hf_[A-Za-z0-9]{20,}")
"""What access tokens of the Hub look like."""

NEEDS_CONSENT = "LT-265"
"""Of the usage error about a download that nobody has agreed to."""

LOGIN = regex(r"(?<=://)[^/\s@]+@")
"""A user and a password in an address."""
_SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_SHORTEST_SECRET = 8  # shorter values would blank out ordinary words


def redact(text: str) -> str:
    """Blank out Hub tokens, also those of the environment, and ``user:password@`` in URLs."""
    for secret in own_secrets():
        text = text.replace(secret, "***")
    return LOGIN.sub("***@", TOKEN.sub("hf_***", text))


def own_secrets() -> list[str]:
    """Tokens in the environment."""
    found = (os.environ.get(name, "").strip() for name in _SECRET_VARIABLES)
    return [secret for secret in found if len(secret) >= _SHORTEST_SECRET]


PARTS = ("file", "key", "expected", "got", "hint")
"""What a message may say beside what failed, in its order."""
STUBS = "loratool-far-"
"""How folders of stand-ins for remote files begin; the path in one is what the user knows."""


def _said(value: object) -> str:
    text = str(value)
    if STUBS in text:
        import tempfile

        top = re.escape(os.path.realpath(tempfile.gettempdir()))
        text = re.sub(rf"{top}[\\/]{STUBS}[^\\/]+[\\/]([a-z0-9+.-]+)[\\/]", r"\1://", text)
    return redact(text)


class LoratoolError(Exception):
    """Root of all errors that are not bugs.

    Args:
        code: ``"LT-nnn"``, unique per kind of failure.
        what: one clause that says what failed.
        file: path or name of the file, as the user knows it.
        key: tensor, module or configuration key.
        expected: what would have been right.
        got: what was found.
        hint: what to do, often a command line.
    """

    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        code: str,
        what: str,
        *,
        file: object | None = None,
        key: object | None = None,
        expected: object | None = None,
        got: object | None = None,
        hint: str | None = None,
    ) -> None:
        self.code = code
        self.what = redact(what)
        self.file = None if file is None else _said(file)
        self.key = None if key is None else _said(key)
        self.expected = None if expected is None else _said(expected)
        self.got = None if got is None else _said(got)
        self.hint = None if hint is None else _said(hint)
        super().__init__(self.message())

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).__new__, (type(self), *self.args), self.__dict__

    def of(self, file: object) -> Self:
        """The same of a file, where it names none."""
        said = {label: getattr(self, label) for label in PARTS}
        return type(self)(self.code, self.what, **{**said, "file": self.file or file})

    def message(self) -> str:
        """The message without its ``error[LT-nnn]:`` head."""
        parts = [self.what]
        for label in PARTS:
            value = getattr(self, label)
            if value is not None:
                parts.append(f"{label} {value}")
        return " · ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """The same fields as an object for ``--json``."""
        out: dict[str, Any] = {"code": self.code, "exit_code": self.exit_code, "what": self.what}
        for label in PARTS:
            value = getattr(self, label)
            if value is not None:
                out[label] = value
        return out


class BugError(LoratoolError):
    """loratool contradicts itself: a bug, whatever the input."""


class UsageError(LoratoolError):
    """The command line or the arguments of a call make no sense."""

    exit_code = 2


class BadFileError(LoratoolError):
    """An input file is damaged, truncated or not what its name says."""

    exit_code = 3


class MismatchError(LoratoolError):
    """Inputs do not belong together, or a feature of them is not supported."""

    exit_code = 4


class OutputError(LoratoolError):
    """The output exists, is locked, or lies in an unsafe place."""

    exit_code = 5


class AlreadyMadeError(OutputError):
    """The output exists, and this very command made it."""


class DiskError(LoratoolError):
    """Disk full, no permission, memory limit, input/output error."""

    exit_code = 6


class HubError(LoratoolError):
    """The Hub or the network."""

    exit_code = 7


class NumericError(LoratoolError):
    """NaN, infinity or overflow where a number was needed."""

    exit_code = 8


class UnsafeContentError(LoratoolError):
    """Pickle, code, or a path that leaves its folder."""

    exit_code = 9


class DifferencesError(LoratoolError):
    """A verification ran to its end and found differences."""

    exit_code = 10


def list_some(items: Iterable[str], limit: int = 10) -> str:
    """Sorted, the first ``limit`` of them, and a count of the rest."""
    ordered = sorted(items)
    shown = ", ".join(ordered[:limit])
    rest = len(ordered) - limit
    return shown if rest <= 0 else f"{shown} and {rest} more"
