"""The engine behind the name tables: templates that can be read in both directions.

A rule is a pair of templates, one for each side.  A template is literal text that starts and
ends at a dot (or at an end of the name); ``{n}`` stands for a run of digits, a leading ``^``
ties it to the start of the name.  Both directions come from the same pair, so a table cannot
say one thing when it reads and another when it writes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from loratool.frozen import Frozen

_HOLE = "{n}"


@cache
def load_data(name: str) -> Mapping[str, Any]:
    """The content of ``archs/data/<name>.json``."""
    text = (Path(__file__).parent / "data" / f"{name}.json").read_text("utf-8")
    data = json.loads(text)
    assert isinstance(data, dict)
    return data


class Rule(Frozen):
    """One rename, usable in both directions.

    Attributes:
        disk: template of the name in the weight files.
        memory: template of the name in the running model.
    """

    disk: str
    memory: str

    def to_memory(self, name: str) -> str:
        """The name with the first match of ``disk`` replaced."""
        return _substitute(self.disk, self.memory, name)

    def to_disk(self, name: str) -> str:
        """The name with the first match of ``memory`` replaced."""
        return _substitute(self.memory, self.disk, name)


class Table(Frozen, dict=True):
    """An ordered list of renames.

    Attributes:
        name: its key in ``renames.json``.
        rules: applied in order on the way to memory, in reverse on the way to disk.
    """

    name: str
    rules: tuple[Rule, ...]

    def to_memory(self, name: str) -> str:
        """On-disk name to in-memory name; a name that no rule knows stays as it is."""
        for rule in self.rules:
            name = rule.to_memory(name)
        return name

    def to_disk(self, name: str) -> str:
        """In-memory name to on-disk name, the inverse of `to_memory`."""
        for rule in reversed(self.rules):
            name = rule.to_disk(name)
        return name

    @cached_property
    def is_empty(self) -> bool:
        """True for the identity."""
        return not self.rules


def read_rules(pairs: Sequence[Sequence[str]]) -> tuple[Rule, ...]:
    """Rules from their JSON form, a list of [disk, memory] pairs."""
    return tuple(Rule(disk, memory) for disk, memory in pairs)


@cache
def _compile(template: str) -> re.Pattern[str]:
    anchored = template.startswith("^")
    body = re.escape(template.removeprefix("^")).replace(re.escape(_HOLE), r"(\d+)")
    head = "^" if anchored else r"(?:^|(?<=\.))"
    return re.compile(head + body + r"(?=\.|$)")


def _substitute(source: str, target: str, name: str) -> str:
    match = _compile(source).search(name)
    if match is None:
        return name
    pieces = target.removeprefix("^").split(_HOLE)
    filled = pieces[0] + "".join(
        group + piece for group, piece in zip(match.groups(), pieces[1:], strict=True)
    )
    return name[: match.start()] + filled + name[match.end() :]
