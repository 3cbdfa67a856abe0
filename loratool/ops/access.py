"""How sources may be reached, and where they lie."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from loratool.frozen import Frozen, field, replace
from loratool.store.rules import FileRules
from loratool.store.source import Resolved, resolve

if TYPE_CHECKING:
    from loratool.ops.residual import Residual
    from loratool.ops.undo import UndoFile

P = TypeVar("P", "UndoFile", "Residual")


class Access(Frozen):
    """How sources may be reached.

    Attributes:
        offline: never touch the network.
        yes: large downloads are agreed to.
        rules: how far files are trusted.
        in_place: remote files are not downloaded but read where they are.
    """

    offline: bool = False
    yes: bool = False
    rules: FileRules = field(default_factory=FileRules)
    in_place: bool = False


def locate(text: str, *, kind: str, access: Access) -> Resolved:
    """Find a source; pickles in it are converted first where that is allowed.

    Raises:
        LoratoolError: see `loratool.store.source.resolve` and
            `loratool.store.unpickled.convert_pickles`.
    """
    pickles = access.rules.allow_pickle
    resolved = resolve(
        text, kind=kind, offline=access.offline, yes=access.yes,
        in_place=access.in_place and not pickles, whole=pickles,
    )  # fmt: skip
    if not pickles:
        return resolved
    from loratool.dialects.registry import beside
    from loratool.store.unpickled import convert_pickles

    return convert_pickles(resolved, beside())


def open_patches(named: str | Path, access: Access, read: Callable[[Path], P]) -> P:
    """Open an undo or a residual file, here or elsewhere; there its patches are read in place.

    Args:
        named: by the user.
        access: how it may be reached.
        read: what reads the table of the file.

    Raises:
        LoratoolError: see `loratool.store.source.resolve` and ``read``.
    """
    found = resolve(str(named), kind="any", offline=access.offline, yes=access.yes, in_place=True)
    return replace(read(found.path), source=found)
