"""``rank_pattern`` and ``alpha_pattern``: PEFT's matching, guarded against runaway patterns.

Patterns come from strangers and Python's engine backtracks, so a pattern is refused whose number
of ways to try could grow out of hand on the names of this adapter.
"""

from __future__ import annotations

import re

# The parser of `re` itself: reading repeats off the text would miss escapes and classes.
import re._parser as _parser  # type: ignore[import-not-found]
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from loratool.errors import BadFileError, list_some

MAX_PATTERN = 512  # characters
MAX_WAYS = 20_000_000  # bound on backtracking per name; about a second at worst

_REPEATS = ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")
_REFUSED = {
    "GROUPREF": "a back reference",
    "GROUPREF_EXISTS": "a conditional group",
    "ASSERT": "a look-around",
    "ASSERT_NOT": "a look-around",
}


class Patterns:
    r"""One pattern table: the first key in file order whose pattern ends a module path wins.

    A key ``k`` matches as ``re.match(rf"(.*\.)?({k})$", name)``, exactly as in PEFT 0.21.2.

    Args:
        table: pattern -> value, in file order.
        field: name of the configuration field, for messages.
        file: the configuration.
    """

    def __init__(self, table: Mapping[str, float], field: str, file: Path | None) -> None:
        self.table = table
        self._field = field
        self._file = file
        self._used: set[str] = set()
        self._keys = list(table)
        # Literal keys are looked up, because files with one pattern per module are common.
        self._whole: dict[str, int] = {}
        self._endings: dict[str, int] = {}
        self._all: list[tuple[int, re.Pattern[str], int, int]] = []
        self._others: list[tuple[int, re.Pattern[str], int, int]] = []
        for number, key in enumerate(table):
            self._add(number, key)

    def get(self, name: str, default: float) -> float:
        """The value for a module path, ``default`` where no pattern matches.

        Raises:
            BadFileError: LT-368, matching could take too long.
        """
        if not self._keys:
            return default
        # "." and "$" treat line breaks specially: names that have one go the plain way.
        is_odd = "\n" in name
        first = len(self._keys) if is_odd else self._first_literal(name)
        for number, pattern, choices, repeats in self._all if is_odd else self._others:
            if number > first:
                break
            if choices * (len(name) + 1) ** repeats > MAX_WAYS:
                self._refuse(self._keys[number], "too many open repeats for such long names")
            if pattern.match(name):
                first = number
                break
        # PEFT looks the name itself up when nothing matches.
        key = self._keys[first] if first < len(self._keys) else name
        if key not in self.table:
            return default
        self._used.add(key)
        return self.table[key]

    @property
    def note(self) -> str | None:
        """A sentence about patterns that never decided anything."""
        unused = [key for key in self.table if key not in self._used]
        return f"{self._field} without effect: {list_some(unused)}" if unused else None

    def _first_literal(self, name: str) -> int:
        """Number of the first literal key that matches, beyond the last key if none does."""
        none = len(self._keys)
        found, start = self._whole.get(name, none), 0
        while True:
            found = min(found, self._endings.get(name[start:], none))
            start = name.find(".", start) + 1
            if not start:
                return found

    def _add(self, number: int, key: str) -> None:
        if len(key) > MAX_PATTERN:
            self._refuse(key[:40] + "…", f"longer than {MAX_PATTERN} characters")
        text = rf"(.*\.)?({key})$"
        try:
            pattern = re.compile(text)
            # The first item is PEFT's own optional prefix.
            choices, repeats = self._weigh(key, list(_parser.parse(text))[1:], inside=False)
        except (re.error, RecursionError, OverflowError) as error:
            self._refuse(key, f"not a regular expression: {error}")
        self._all.append((number, pattern, choices, repeats))
        literal = _literal(key)
        if literal is None:
            self._others.append(self._all[-1])
        else:
            where = self._whole if literal[1] else self._endings
            where.setdefault(literal[0], number)

    def _weigh(self, key: str, items: Any, *, inside: bool) -> tuple[int, int]:
        """(alternatives multiplied, open repeats) of a parsed pattern."""
        choices, repeats = 1, 0
        for op, value in items:
            name = str(op)
            if name in _REFUSED:
                self._refuse(key, f"{_REFUSED[name]} is not supported")
            if name in _REPEATS:
                low, high, body = value
                if inside and high != low:
                    self._refuse(key, "a repeat inside a repeat can take forever")
                more = self._weigh(key, body, inside=inside or int(high) > 1)
                choices, repeats = choices * more[0], repeats + more[1] + (high != low)
            elif name == "BRANCH":
                if inside:
                    self._refuse(key, "alternatives inside a repeat can take forever")
                choices *= len(value[1])
                for branch in value[1]:
                    more = self._weigh(key, branch, inside=inside)
                    choices, repeats = choices * more[0], repeats + more[1]
            elif name in ("SUBPATTERN", "ATOMIC_GROUP"):
                body = value[-1] if name == "SUBPATTERN" else value
                more = self._weigh(key, body, inside=inside)
                choices, repeats = choices * more[0], repeats + more[1]
        return choices, repeats

    def _refuse(self, key: str, why: str) -> NoReturn:
        raise BadFileError(
            "LT-368", "unusable pattern", file=self._file, key=f"{self._field}.{key}", got=why,
            expected=f"a regular expression of at most {MAX_PATTERN} characters",
        )  # fmt: skip


def _literal(key: str) -> tuple[str, bool] | None:
    """(text, is it tied to the beginning) of a pattern without any operator, else None."""
    try:
        items = list(_parser.parse(key))
    except re.error:  # parentheses that only balance inside PEFT's own group
        return None
    is_tied = bool(items) and str(items[0][0]) == "AT" and str(items[0][1]) == "AT_BEGINNING"
    rest = items[1:] if is_tied else items
    if any(str(op) != "LITERAL" for op, _ in rest):
        return None
    return "".join(chr(value) for _, value in rest), is_tied
