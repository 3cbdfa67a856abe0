"""Rows of other packages: dialects, kinds and codecs that an installed package brings along.

A package names them in its ``pyproject.toml``::

    [project.entry-points."loratool.dialects"]
    mine = "my_package:DIALECT"

They are looked for only where no row of loratool's own has the answer.
"""

from __future__ import annotations

from functools import cache
from typing import TypeVar

from loratool.errors import MismatchError

Row = TypeVar("Row")


@cache
def load(group: str, kind: type[Row]) -> tuple[Row, ...]:
    """The rows that entry points of a group name.

    Args:
        group: ``loratool.dialects``, ``loratool.kinds``, ``loratool.codecs``.
        kind: what each of them must be.

    Raises:
        MismatchError: LT-419, an entry point that cannot be loaded, or is something else.
    """
    from importlib.metadata import entry_points

    rows = []
    for entry in sorted(entry_points(group=group), key=lambda e: (e.name, e.value)):
        try:
            row = entry.load()
        except Exception as error:  # whatever a package of others does when it is imported
            raise _refused(group, entry.value, f"{type(error).__name__}: {error}") from error
        if not isinstance(row, kind):
            raise _refused(group, entry.value, type(row).__name__)
        rows.append(row)
    return tuple(rows)


def _refused(group: str, value: str, got: str) -> MismatchError:
    return MismatchError(
        "LT-419", "an installed package adds something that is not usable", file=value, key=group,
        got=got, hint="uninstall that package, or a version of it that fits",
    )  # fmt: skip
