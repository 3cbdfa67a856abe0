"""Shapes of data from outside, as Python types: checked once, before anything uses the data.

JSON, YAML, tables and answers of a server can have any type anywhere.  A shape is a dataclass,
TypedDict or other type that says what is accepted; `checked` turns plain data into it, or says
where it differs.  Unknown keys of an object are dropped.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")

_MESSAGE = re.compile(
    r"Expected (?P<expected>.*?)(, got (?P<got>.*?))?( - at `(?P<key>[^`]*)`.*)?", re.DOTALL
)


def checked(
    value: Any, shape: type[T], refuse: Callable[[str | None, str, str | None], NoReturn]
) -> T:
    """``value`` as ``shape``: nothing is converted but lists to tuples and objects to dataclasses.

    Args:
        value: dictionaries, lists, texts, numbers, true, false and null.
        shape: what is accepted.
        refuse: called with (place such as ``options.rename[2]``, expected, got) if it is not;
            it must raise.

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
    data: bytes, shape: type[T], refuse: Callable[[str | None, str, str | None], NoReturn]
) -> T:
    """`checked` for JSON text; what the shape does not name is not even built.

    Args:
        data: in UTF-8.
        shape: what is accepted.
        refuse: see `checked`.
    """
    import msgspec

    return _refused(lambda: msgspec.json.decode(data, type=shape), refuse)


def _refused(
    build: Callable[[], T], refuse: Callable[[str | None, str, str | None], NoReturn]
) -> T:
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
    except RecursionError:
        refuse(None, "data that is nested less deeply", None)


def _place(text: str) -> str | None:
    return text.removeprefix("$").removeprefix(".") or None
