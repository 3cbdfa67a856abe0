"""How sources may be reached, and where they lie."""

from __future__ import annotations

from loratool.frozen import Frozen, field
from loratool.store.rules import FileRules
from loratool.store.source import Resolved, resolve


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
