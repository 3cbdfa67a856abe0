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
        self._compiled = {key: self._compile(key) for key in table}

    def get(self, name: str, default: float) -> float:
        """The value for a module path, ``default`` where no pattern matches.

        Raises:
            BadFileError: LT-368, matching could take too long.
        """
        for key, (pattern, choices, repeats) in self._compiled.items():
            if choices * (len(name) + 1) ** repeats > MAX_WAYS:
                self._refuse(key, "too many open repeats for names of this length")
            if pattern.match(name):
                self._used.add(key)
                return self.table[key]
        if name in self.table:  # PEFT looks the name itself up when nothing matches
            self._used.add(name)
            return self.table[name]
        return default

    @property
    def note(self) -> str | None:
        """A sentence about patterns that never decided anything."""
        unused = [key for key in self.table if key not in self._used]
        return f"{self._field} without effect: {list_some(unused)}" if unused else None

    def _compile(self, key: str) -> tuple[re.Pattern[str], int, int]:
        if len(key) > MAX_PATTERN:
            self._refuse(key[:40] + "…", f"longer than {MAX_PATTERN} characters")
        text = rf"(.*\.)?({key})$"
        try:
            pattern = re.compile(text)
            # The first item is PEFT's own optional prefix.
            choices, repeats = self._weigh(key, list(_parser.parse(text))[1:], inside=False)
        except (re.error, RecursionError, OverflowError) as error:
            self._refuse(key, f"not a regular expression: {error}")
        return pattern, choices, repeats

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
