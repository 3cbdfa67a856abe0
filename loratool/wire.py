"""Plain records as JSON and back, nothing shortened: what travels between processes.

`loratool.plan.plain` is the other form: the same for equal content wherever its files lie.
"""

from __future__ import annotations

import base64
import json
import types
import typing
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from loratool.errors import BugError
from loratool.frozen import names_of
from loratool.location import STAYS
from loratool.plan import Plan

T = TypeVar("T")

_TAG = "is"


def dump(value: Any) -> bytes:
    """Plain data as JSON; fields at their default are left out.

    Raises:
        BugError: LT-004, it holds something that cannot travel.
    """
    return json.dumps(_lay_out(value), separators=(",", ":")).encode()


def load(text: bytes | str, shape: type[T]) -> T:
    """What `dump` made, checked field by field.

    Raises:
        BugError: LT-004.
    """
    try:
        found = _build(json.loads(text))
    except (ValueError, TypeError, KeyError) as error:
        raise BugError("LT-004", "a plan that cannot be read", got=error) from error
    if not fits(found, shape):
        raise BugError("LT-004", "a plan that cannot be read", expected=shape.__name__)
    assert isinstance(found, shape)
    return found


def _lay_out(value: Any) -> Any:
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, Path):
        return {_TAG: "path", "at": str(value)}
    if isinstance(value, (bytes, memoryview)):
        return {_TAG: "bytes", "base64": base64.b64encode(value).decode()}
    if isinstance(value, Mapping):
        return {str(k): _lay_out(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_lay_out(v) for v in value]
    if type(value) not in _classes().values():
        raise BugError("LT-004", "a plan that cannot travel", got=type(value).__name__)
    kind: Any = type(value)  # classes are hashable, which type checkers doubt
    usual = _defaults(kind)
    found = ((name, getattr(value, name)) for name in names_of(value) if name != STAYS)
    return {_TAG: type(value).__name__} | {
        n: _lay_out(v) for n, v in found if n not in usual or v != usual[n]
    }


@cache
def _defaults(kind: Any) -> dict[str, Any]:
    """The fields of a class of records that have a default, and what it is."""
    values = kind.__struct_defaults__
    return dict(zip(names_of(kind)[len(names_of(kind)) - len(values) :], values, strict=True))


def _build(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_build, value))
    if not isinstance(value, dict):
        return value
    if _TAG not in value:
        return {k: _build(v) for k, v in value.items()}
    rest = {k: _build(v) for k, v in value.items() if k != _TAG}
    if value[_TAG] == "path":
        return Path(rest["at"])
    if value[_TAG] == "bytes":
        return base64.b64decode(rest["base64"], validate=True)
    return _classes()[value[_TAG]](**rest)


def fits(value: Any, shape: Any) -> bool:
    """True if a value, and all that it holds, is of a type."""
    return _test(shape)(value)


@cache
def _test(shape: Any) -> Callable[[Any], bool]:
    """The test of a type, made once: a large plan has tens of thousands of values."""
    origin, inner = typing.get_origin(shape), typing.get_args(shape)
    if shape is Any:
        return lambda value: True
    if origin in (types.UnionType, typing.Union):
        tests = [_test(one) for one in inner]
        return lambda value: any(test(value) for test in tests)
    if origin is tuple:
        return _test_tuple(inner)
    if origin is not None:
        key, item = map(_test, inner)
        return lambda value: (
            isinstance(value, origin) and all(key(k) and item(v) for k, v in value.items())
        )
    if shape in (int, float):
        kinds = (int, float) if shape is float else int
        return lambda value: isinstance(value, kinds) and not isinstance(value, bool)
    fields = list(_hints(shape).items())  # each made when it is needed: types may hold themselves
    return lambda value: (
        isinstance(value, shape) and all(_test(kind)(getattr(value, name)) for name, kind in fields)
    )


def _test_tuple(inner: tuple[Any, ...]) -> Callable[[Any], bool]:
    first = _test(inner[0])
    if inner[-1] is ...:
        return lambda value: isinstance(value, tuple) and all(map(first, value))
    tests = [_test(one) for one in inner]
    return lambda value: (
        isinstance(value, tuple) and len(value) == len(tests)
        and all(test(item) for test, item in zip(tests, value, strict=True))
    )  # fmt: skip


@cache
def _hints(shape: Any) -> dict[str, Any]:
    """Types of the fields; none of what is no record."""
    if not names_of(shape):
        return {}
    hints = typing.get_type_hints(shape)
    return {name: hints[name] for name in names_of(shape)}


@cache
def _classes() -> dict[str, type]:
    """What may be in a plan, by name: every record that a field of one may hold."""
    found: dict[str, type] = {}

    def walk(shape: Any) -> None:
        for inner in typing.get_args(shape):
            walk(inner)
        if isinstance(shape, type) and _hints(shape) and shape.__name__ not in found:
            found[shape.__name__] = shape
            for kind in (*_hints(shape).values(), *shape.__subclasses__()):
                walk(kind)

    walk(Plan)
    return found
