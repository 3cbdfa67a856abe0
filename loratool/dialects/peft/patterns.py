"""``rank_pattern`` and ``alpha_pattern``: PEFT's matching, in bounded time; names by their endings.

Patterns come from strangers and Python's engine backtracks, so a pattern is refused that could
take too many steps on a name of this adapter, and a table that takes seconds on all of them.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import NoReturn

from loratool.errors import BadFileError, list_some
from loratool.lazy import regex
from loratool.patterns import MAX_PATTERN, Pattern, compile_pattern, steps_of

MAX_WAYS = 20_000_000  # bound on backtracking per name; about a second at worst
MAX_EXPRESSIONS = 1000  # in a table; of keys without operators there may be many more
MAX_SECONDS = 3  # of this thread, for all names

# Nothing but characters, escaped punctuation, and dots.
_PLAIN = regex(r"\^?(?:\\[^A-Za-z0-9\n]|[^\\^$*+?{}\[\]|()\n])*")
_ATOM = regex(r"\\(.)|(.)")
Dots = tuple[int, ...]


def endings(path: str) -> Iterator[str]:
    """The path without its first component, without its first two, and so on.

    Example:
        >>> list(endings("model.layers.0"))
        ['layers.0', '0']
    """
    start = path.find(".") + 1
    while start:
        yield path[start:]
        start = path.find(".", start) + 1


def is_named(path: str, entries: Collection[str]) -> bool:
    """True if one of the entries, quickly looked up, is the path or its last components."""
    while path not in entries:
        _, dot, path = path.partition(".")
        if not dot:
            return False
    return True


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
        self._seconds = 0.0
        # Keys without operators are looked up, because files with one per module are common:
        # (tied to the beginning, length) -> where their dots are -> text -> number.
        self._plain: dict[tuple[bool, int], dict[Dots, dict[str, int]]] = {}
        self._others: list[int] = []
        self._compiled: dict[int, Pattern] = {}
        self._steps: dict[tuple[int, int], float] = {}
        for number, key in enumerate(table):
            self._add(number, key)

    def get(self, name: str, default: float) -> float:
        """The value for a module path, ``default`` where no pattern matches.

        Raises:
            BadFileError: LT-368, matching could take too long.
        """
        if not self._keys:
            return default
        started = time.thread_time()
        first = self._first(name)
        self._seconds += time.thread_time() - started
        if self._seconds > MAX_SECONDS:
            self._refuse(None, "takes too long on the names of this adapter")
        # PEFT looks the name itself up when nothing matches.
        key = name if first is None else self._keys[first]
        if key not in self.table:
            return default
        self._used.add(key)
        return self.table[key]

    @property
    def note(self) -> str | None:
        """A sentence about patterns that never decided anything."""
        unused = [key for key in self.table if key not in self._used]
        return f"{self._field} without effect: {list_some(unused)}" if unused else None

    def _add(self, number: int, key: str) -> None:
        if len(key) > MAX_PATTERN or not _PLAIN.fullmatch(key):
            self._others.append(number)
            if len(self._others) > MAX_EXPRESSIONS:
                self._refuse(None, f"more than {MAX_EXPRESSIONS} keys with operators")
            self._pattern(number)
            return
        is_tied = key.startswith("^")
        atoms = _ATOM.findall(key[is_tied:])
        text = "".join(escaped or char for escaped, char in atoms)
        dots = tuple(at for at, (_, char) in enumerate(atoms) if char == ".")
        groups = self._plain.setdefault((is_tied, len(text)), {})
        groups.setdefault(dots, {}).setdefault(_without(text, dots), number)

    def _first(self, name: str) -> int | None:
        """Number of the first key that matches."""
        # "." and "$" treat line breaks specially: names that have one go the plain way.
        is_odd = "\n" in name
        best = None if is_odd else self._first_plain(name)
        for number in range(len(self._keys)) if is_odd else self._others:
            if best is not None and number > best:
                break
            if self._matches(number, name):
                return number
        return best

    def _first_plain(self, name: str) -> int | None:
        found = list(self._lookups(True, name))
        for text in (name, *endings(name)):
            found += self._lookups(False, text)
        return min(found, default=None)

    def _lookups(self, is_tied: bool, text: str) -> Iterator[int]:
        for dots, numbers in self._plain.get((is_tied, len(text)), {}).items():
            number = numbers.get(_without(text, dots))
            if number is not None:
                yield number

    def _matches(self, number: int, name: str) -> bool:
        pattern = self._pattern(number)
        size = len(name)
        if (number, size) not in self._steps:
            self._steps[number, size] = steps_of(pattern.text, size)
        # PEFT's own optional prefix is the first of the repeats.
        if self._steps[number, size] > MAX_WAYS * (size + 1):
            self._refuse(self._keys[number], "too many open repeats for such long names")
        return pattern.compiled.match(name) is not None

    def _pattern(self, number: int) -> Pattern:
        if number not in self._compiled:
            key = self._keys[number]

            def refuse(why: str) -> NoReturn:
                self._refuse(key, f"not a regular expression: {why}")

            self._compiled[number] = compile_pattern(key, refuse, within=r"(.*\.)?({})$")
        return self._compiled[number]

    def _refuse(self, key: str | None, why: str) -> NoReturn:
        place = self._field if key is None else f"{self._field}.{key[:200]}"
        raise BadFileError(
            "LT-368", "unusable pattern", file=self._file, key=place, got=why,
            expected=f"a regular expression of at most {MAX_PATTERN} characters",
        )  # fmt: skip


def _without(text: str, dots: Dots) -> str:
    """The text with dots where any character will do."""
    ends = (*dots, len(text))
    starts = (0, *(dot + 1 for dot in dots))
    return ".".join(text[start:end] for start, end in zip(starts, ends, strict=True))
