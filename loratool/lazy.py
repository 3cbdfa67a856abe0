"""Regular expressions that are compiled when they are first used.

A command uses few of all that the modules hold which it loads, and compiling one takes longer than
loading a small module.
"""

from __future__ import annotations

import re
from typing import Any, AnyStr, cast


class _Lazy:
    """An expression until it is used; then its methods are those of the compiled one."""

    def __init__(self, text: str | bytes, flags: int) -> None:
        self._text, self._flags = text, flags

    def __getattr__(self, name: str) -> Any:
        found = getattr(re.compile(self._text, self._flags), name)
        setattr(self, name, found)
        return found


def regex(text: AnyStr, flags: int = 0) -> re.Pattern[AnyStr]:
    """What `re.compile` makes, later; for expressions of this package, which are known to be right.

    Args:
        text: the expression.
        flags: of `re`.
    """
    return cast("re.Pattern[AnyStr]", _Lazy(text, flags))
