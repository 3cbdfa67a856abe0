"""What an option is: a field of an options class, annotated with the words that go with it."""

import types
from collections.abc import Mapping, Sequence
from functools import cache
from inspect import get_annotations
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    NamedTuple,
    Self,
    TypeVar,
    Union,
    dataclass_transform,
    get_args,
    get_origin,
)

if TYPE_CHECKING:
    from dataclasses import KW_ONLY as KW_ONLY
else:

    class KW_ONLY:  # noqa: N801
        """What type checkers know by this name; the module that has it is long in loading."""


IDLE: tuple[Any, ...] = (None, False, (), [], "auto")
"""Values that say nothing: they are not recorded, and refused nowhere."""

T = TypeVar("T", bound="Options")


class Words(NamedTuple):
    """What is said about an option, once, for the command line, Python and recipes.

    Attributes:
        help: a sentence or two.
        section: of the help page; "" = in Python alone.
        flags: as typed, ``-o, --output``; "" = the field's name with dashes.
        metavar: placeholder for its value; None = by its type.
        form: how a value is read where its type does not say it (see `loratool.cli.forms`).
        choices: what it may be, where its type does not say it.
        record: name in the provenance of what it changes; True = the field's; "" = not recorded.
    """

    help: str
    section: str = ""
    flags: str = ""
    metavar: str | None = None
    form: str = ""
    choices: tuple[str, ...] = ()
    record: str | bool = ""


class Option(NamedTuple):
    """A field of an options class.

    Attributes:
        name: keyword in Python.
        type: of its value.
        default: Ellipsis if it has to be given.
        words: what is said about it.
        is_positional: may be given without its name.
    """

    name: str
    type: Any
    default: Any
    words: Words
    is_positional: bool

    @property
    def is_required(self) -> bool:
        """True if there is no default."""
        return self.default is ...

    @property
    def is_many(self) -> bool:
        """True for a list of texts: a flag that may be repeated."""
        return get_origin(self.type) is Sequence and get_args(self.type)[0] is not float

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that it may be, empty if others may be too."""
        parts = [t for t in alternatives(self.type) if t is not type(None)]
        literal = len(parts) == 1 and get_origin(parts[0]) is Literal
        return get_args(parts[0]) if literal else self.words.choices

    @property
    def flags(self) -> tuple[str, ...]:
        """As typed, the long one last."""
        spelled = self.words.flags or "--" + self.name.replace("_", "-")
        return tuple(flag.strip() for flag in spelled.split(","))

    @property
    def key(self) -> str:
        """Its name in recipes: the flag without its dashes, ``for``."""
        return self.flags[-1].partition("/")[0].removeprefix("--")

    @property
    def recorded(self) -> str:
        """Its name in provenance, "" if it changes no byte."""
        record = self.words.record
        return self.name if record is True else record or ""

    def is_idle(self, value: Any) -> bool:
        """True for a value that says nothing: the default, or one like it."""
        return value in IDLE or value == self.default


@dataclass_transform(kw_only_default=True, frozen_default=True)
class Options:
    """A group of options, or all those of a command: fields annotated with `Words`.

    A frozen dataclass to the reader and to type checkers; `dataclass` itself writes code for
    every class, which every ``--help`` would wait for.
    """

    def __init_subclass__(cls, kw_only: bool = True) -> None:
        """``kw_only=False``: what stands before ``_: KW_ONLY`` may be given without its name."""

    def __init__(self, *args: Any, **given: Any) -> None:
        options = options_of(type(self))
        given |= dict(zip((o.name for o in options if o.is_positional), args, strict=False))
        for option in options:
            value = given.pop(option.name, option.default)
            if value is ...:
                raise TypeError(f"missing a required argument: {option.name!r}")
            if option.is_many and isinstance(value, (str, Path)):  # a text is a list of letters
                raise TypeError(f"{option.name!r} is a list: [{str(value)!r}]")
            self.__dict__[option.name] = tuple(value) if isinstance(value, list) else value
        if given:
            raise TypeError(f"no option {next(iter(given))!r}")
        self.check()

    def check(self) -> None:
        """Refuse values that cannot be meant."""

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"cannot assign to {name!r}")

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((type(self), tuple(vars(self).items())))

    def __repr__(self) -> str:
        said = [f"{o.name}={v!r}" for o in options_of(type(self))
                if (v := getattr(self, o.name)) != o.default]  # fmt: skip
        return f"{type(self).__name__}({', '.join(said)})"

    def take(self, kind: type[T], **more: Any) -> T:
        """The options of another class that these have too, and more."""
        return kind(**{**only_of(kind, vars(self)), **more})

    def replace(self, **changes: Any) -> Self:
        """The same with some values changed."""
        return type(self)(**{**vars(self), **changes})


def options_of(kind: type[Options]) -> tuple[Option, ...]:
    """The options of a class, in the order in which they are read: its own, then those it takes."""
    key: Any = kind  # classes are hashable, which type checkers doubt
    return _options_of(key)


@cache
def _options_of(kind: Any) -> tuple[Option, ...]:
    found: dict[str, Option] = {}
    for home in kind.__mro__:
        hints = get_annotations(home)
        marked = any(hint is KW_ONLY for hint in hints.values())
        for name, hint in hints.items():
            marked = marked and hint is not KW_ONLY
            words = [m for m in getattr(hint, "__metadata__", ()) if isinstance(m, Words)]
            if words and name not in found:
                default = getattr(kind, name, ...)
                found[name] = Option(name, hint.__origin__, default, words[0], marked)
    return tuple(found.values())


def recorded(options: Options, **resolved: Any) -> dict[str, Any]:
    """The options that change bytes, as provenance has them: none at its default.

    Args:
        options: of a command, or a group of them.
        resolved: what stands for some of them there, such as bytes for ``20MB``; these come first.
    """
    found: dict[str, Any] = {}
    known = {o.name: o for o in options_of(type(options))}
    for option in (known[name] for name in dict.fromkeys([*resolved, *known])):
        value = resolved.get(option.name, getattr(options, option.name))
        if option.recorded and not option.is_idle(value):
            found[option.recorded] = list(value) if isinstance(value, tuple) else value
    return found


def only_of(kind: type[Options], given: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords among ``given`` that a class has."""
    names = {o.name for o in options_of(kind)}
    return {name: value for name, value in given.items() if name in names}


def asked_of(kind: type[Options], given: Mapping[str, Any]) -> list[Option]:
    """The options of a class that are not at their default in ``given``."""
    return [o for o in options_of(kind) if o.name in given and not o.is_idle(given[o.name])]


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The types of a union; of any other type itself."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def typed(given: Mapping[str, Any], *kinds: type[Options]) -> list[str]:
    """The options of some classes as they would be typed: those that are not at their default."""
    words: list[str] = []
    for one in (one for kind in kinds for one in asked_of(kind, given) if one.words.section):
        value, flag = given[one.name], one.flags[-1]
        if isinstance(value, bool):
            words.append(flag)
        elif one.is_many:
            words += [word for text in value for word in (flag, text)]
        else:
            numbers = value if isinstance(value, tuple) else (value,)
            words += [flag, ",".join(map(_plain, numbers))]
    return words


def _plain(value: Any) -> str:
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)
