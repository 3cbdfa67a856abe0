"""Rows of registries: the functions that they name, and rows of other packages.

Rows name functions as ``module:function``, so that no registry imports torch.

A package names its dialects, kinds and codecs in its ``pyproject.toml``::

    [project.entry-points."loratool.dialects"]
    mine = "my_package:DIALECT"

Those are looked for only where no row of loratool's own has the answer.
"""

from __future__ import annotations

from collections.abc import Container
from functools import cache
from importlib import import_module
from typing import Any, Protocol, TypeVar

from loratool.errors import MismatchError


class Named(Protocol):
    """A row of any registry."""

    @property
    def name(self) -> str:
        """By which it is found."""


Row = TypeVar("Row", bound=Named)


def function_of(text: str) -> Any:
    """The function or class that a row names as ``module:function``.

    Raises:
        ImportError, AttributeError: there is none.
    """
    module, _, name = text.partition(":")
    return getattr(import_module(module), name)


def load(group: str, kind: type[Row], own: Container[str]) -> dict[str, Row]:
    """The rows that entry points of a group name, by their names; one of our own names stays ours.

    Args:
        group: ``loratool.dialects``, ``loratool.kinds``, ``loratool.codecs``.
        kind: what each of them must be.
        own: names of loratool's own rows.

    Raises:
        MismatchError: LT-419, an entry point that cannot be loaded, or is something else.
    """
    return {row.name: row for row in _load(group, kind) if row.name not in own}


@cache
def _load(group: str, kind: type[Row]) -> tuple[Row, ...]:
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
