"""What all reports have in common."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from loratool.frozen import Frozen, Struct, asdict, names_of

SCHEMA = 1
_LONG = 60  # characters of a value in the short form of a report


class Report(Frozen):
    """Base of all reports."""

    command: ClassVar[str]

    def __repr__(self) -> str:
        """Short: what is long is counted; `to_json` has all of it."""
        names = [n for n in names_of(self) if getattr(self, n) not in (None, (), {}, "", False)]
        said = ", ".join(f"{name}={_short(getattr(self, name))}" for name in names)
        return f"{type(self).__name__}({said})"

    @property
    def ok(self) -> bool:
        """False if the command ran to its end and the answer is bad news (``verify``)."""
        return True

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON types."""
        head = {"schema": SCHEMA, "command": self.command, "ok": self.ok}
        return head | _values(self)


def _short(value: Any) -> str:
    if isinstance(value, (tuple, list)) and value and isinstance(value[0], Struct):
        return f"[{len(value)} {type(value[0]).__name__}]"
    if isinstance(value, Struct):
        return f"{type(value).__name__}(…)"
    text = repr(value)
    return text if len(text) <= _LONG else f"{text[:_LONG]}…"


class Plain(dict[str, Any]):
    """What consists of JSON's types as it is, and may be large."""


def plain_json(value: Any) -> Any:
    """Records, tuples and paths as JSON types; NaN and infinity as null."""
    if isinstance(value, Plain):
        return value
    if isinstance(value, Struct):
        return _values(value)
    if isinstance(value, Mapping):
        return {str(k): plain_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Path):
        return str(value)
    return value


def _values(record: Struct) -> dict[str, Any]:
    return {name: plain_json(value) for name, value in asdict(record).items()}


def share(part: float, whole: float) -> float:
    """Part ÷ whole, 0 of nothing."""
    return part / whole if whole > 0 else 0.0


def root_share(part_square: float, whole_square: float) -> float:
    """√(part/whole), 0 where there is nothing to lose."""
    return math.sqrt(share(part_square, whole_square))


GOOD = ("yes", "unsure")
"""Verdicts with which an adapter is written for a program."""


class Failed(Frozen):
    """An adapter of several that was left out, with ``keep_going``.

    Attributes:
        source: as named.
        error: as ``--json`` prints it.
    """

    source: str
    error: dict[str, Any]


class Loads(Frozen):
    """Whether a program loads the adapter.

    Attributes:
        program: ``PEFT``, ``vLLM``, ``llama.cpp``.
        verdict: ``yes``, ``no``, ``wrong`` (loads, and computes something else), or ``unsure``
            (not known, or it depends on the base).
        reasons: why, in few words each.
        version: of the program, whose source the rules were read from.
        source: the files.
    """

    program: str
    verdict: str
    reasons: tuple[str, ...] = ()
    version: str = ""
    source: tuple[str, ...] = ()
