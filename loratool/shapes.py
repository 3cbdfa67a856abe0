"""Shapes of data from outside, as Python types: checked once, before anything uses the data.

JSON, YAML, tables and answers of a server can have any type anywhere.  A shape is a record,
TypedDict or other type that says what is accepted; `checked` turns plain data into it, or says
where it differs.  Unknown keys of an object are dropped.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from loratool.lazy import regex

T = TypeVar("T")
Refuse = Callable[[str | None, str, str | None], NoReturn]
"""Called with (place such as ``options.rename[2]``, expected, got); it must raise."""

_MESSAGE = regex(
    r"Expected (?P<expected>.*?)(, got (?P<got>.*?))?( - at `(?P<key>[^`]*)`.*)?", re.DOTALL
)


def checked(value: Any, shape: type[T], refuse: Refuse) -> T:
    """``value`` as ``shape``: nothing is converted but lists to tuples and objects to records.

    Args:
        value: dictionaries, lists, texts, numbers, true, false and null.
        shape: what is accepted.
        refuse: called if it is not.

    Example:
        >>> def refuse(key, expected, got):
        ...     raise ValueError(f"{key}: expected {expected}, got {got}")
        >>> checked({"a": [1, "2"]}, dict[str, list[int]], refuse)
        Traceback (most recent call last):
        ValueError: [...][1]: expected int, got str
    """
    import msgspec

    return _refused(lambda: msgspec.convert(value, shape), refuse)


def checked_json(
    data: bytes | bytearray,
    shape: type[T],
    refuse: Callable[[str | None, str, str | None], NoReturn],
) -> T:
    """`checked` for JSON text; what the shape does not name is not even built.

    Args:
        data: in UTF-8.
        shape: what is accepted.
        refuse: see `checked`.
    """
    import msgspec

    return _refused(lambda: msgspec.json.decode(data, type=shape), refuse)


def fitting(value: Any, shape: type[T]) -> T | None:
    """`checked`, with None for what does not fit.

    Example:
        >>> fitting({"names": ["a", 1]}, dict[str, list[str]]) is None
        True
    """
    return _or_none(lambda: checked(value, shape, _misfit))


def fitting_json(text: str | bytes, shape: type[T]) -> T | None:
    """`checked_json`, with None for what does not fit or is no JSON."""
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    return _or_none(lambda: checked_json(data, shape, _misfit))


class _MisfitError(Exception):
    pass


def _misfit(*_: object) -> NoReturn:
    raise _MisfitError


def _or_none(build: Callable[[], T]) -> T | None:
    try:
        return build()
    except _MisfitError:
        return None


def _refused(build: Callable[[], T], refuse: Refuse) -> T:
    import msgspec

    try:
        return build()
    except msgspec.ValidationError as error:
        found = _MESSAGE.fullmatch(str(error))
        if found is None:  # "Object missing required field `a`", an invalid value
            text, _, place = str(error).partition(" - at `")
            refuse(_place(place.partition("`")[0]), text.replace("`", ""), None)
        refuse(
            _place(found["key"] or ""), found["expected"].replace("`", ""),
            found["got"] and found["got"].replace("`", ""),
        )  # fmt: skip
    except (msgspec.DecodeError, UnicodeDecodeError):
        refuse(None, "JSON", "other text")
    except UnicodeEncodeError:
        refuse(None, "Unicode", "half a surrogate pair")
    except RecursionError:
        refuse(None, "data that is nested less deeply", None)


def _place(text: str) -> str | None:
    return text.removeprefix("$").removeprefix(".") or None
