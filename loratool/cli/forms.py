"""How the value of an option is read from what was typed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import click
from click.types import StringParamType

from loratool.errors import UsageError
from loratool.lazy import regex
from loratool.options.words import Option, alternatives

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

_WEIGHT = regex(r"[+-]?(\d+(\.\d*)?|\.\d+)")


class WeightList(click.ParamType[tuple[float, ...]]):
    """``0.7,-0.3``: plain finite decimals, no exponent."""

    name = "W,W"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        """Parse, or fail naming the part that is not a number."""
        if isinstance(value, tuple):
            return value
        parts = [part.strip() for part in str(value).split(",")]
        from loratool.store.source import is_weight

        for part in parts:
            if not is_weight(part):
                self.fail(f"{part[:80]!r} is not a plain decimal number", param, ctx)
        return tuple(float(part) for part in parts)


class WholeNumber(click.ParamType[int]):
    """A whole number above 0.

    Args:
        name: placeholder in the help page.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse, or say why not."""
        text = str(value)
        if not _is_whole(text):
            raise click.BadParameter(self.explain(text), ctx=ctx, param=param)
        return int(text)

    def explain(self, text: str) -> str:
        """Why ``text`` is refused."""
        return f"{text[:80]!r} is not a whole number above 0"


def _is_whole(text: str) -> bool:
    """True for a whole number above 0 that any option can take."""
    return text.isascii() and text.isdigit() and len(text) <= 18 and int(text) > 0


class Number(click.ParamType[float]):
    """A plain finite decimal, as weights are.

    Args:
        name: placeholder in the help page.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Parse, or say why not."""
        from loratool.store.source import MAX_WEIGHT, is_weight

        if not is_weight(str(value)):
            raise click.BadParameter(
                f"{str(value)[:80]!r} is not a plain decimal number of at most {MAX_WEIGHT:g}",
                ctx=ctx, param=param,
            )  # fmt: skip
        return float(value)


class RankNumber(click.ParamType[int | str]):
    """A rank or ``auto``; a fraction is probably meant as a share of energy."""

    name = "R|auto"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | str:
        """Parse, or say why not."""
        text = str(value)
        if text == "auto":
            return text
        if _is_whole(text):
            return int(text)
        why = f"{text[:80]!r} is neither a whole number above 0 nor auto"
        if _WEIGHT.fullmatch(text):
            why += "; a share of the energy is --energy"
        raise click.BadParameter(why, ctx=ctx, param=param)


class Share(click.ParamType[float]):
    """A number between 0 and 1, such as 0.99."""

    name = "SHARE"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Parse, or say why not."""
        text = str(value)
        if not (_WEIGHT.fullmatch(text) and 0 <= float(text) <= 1):
            raise click.BadParameter(
                f"{text!r} is not a number from 0 to 1, such as 0.99", ctx=ctx, param=param
            )
        return float(text)


class Ratio(click.ParamType[float]):
    """A number of 1 or more."""

    name = "X"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Parse, or say why not."""
        try:
            found = float(value)
        except ValueError:
            found = 0.0
        if not 1 <= found < float("inf"):
            raise click.BadParameter(
                f"{str(value)!r} is not a number of 1 or more", ctx=ctx, param=param
            )
        return found


class OneOf(click.Choice[str]):
    """One of some words; another one gets the nearest as a hint."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The word, or an error that lists all."""
        words = [str(choice) for choice in self.choices]
        if value in words:
            return str(value)
        import difflib

        name = "" if param is None else param.opts[-1]
        close = difflib.get_close_matches(str(value), words, n=1, cutoff=0.5)
        raise UsageError("LT-204", f"unknown {name}", expected=", ".join(words), got=value,
                         hint=f"{name} {close[0]}" if close else None)  # fmt: skip


class File(StringParamType):
    """A text that the shell completes as a path."""

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Files and folders."""
        from click.shell_completion import CompletionItem

        return [CompletionItem(incomplete, type="file")]


class Named(StringParamType):
    """A text that the shell completes with words known here.

    Args:
        words: finds them.
    """

    def __init__(self, words: Callable[[], Iterable[str]]) -> None:
        self._words = words

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Those that begin so."""
        from click.shell_completion import CompletionItem

        return [CompletionItem(word) for word in self._words() if word.startswith(incomplete)]


def _programs() -> Iterable[str]:
    from loratool.dialects.programs import programs

    return (program.name for program in programs())


def _dialects() -> Iterable[str]:
    from loratool.dialects.registry import written

    return written()


def form_of(option: Option) -> click.ParamType[Any] | type | None:
    """What click reads an option's value with."""
    metavar = option.words.metavar or ""
    forms: dict[str, click.ParamType[Any]] = {
        "whole": WholeNumber(metavar), "number": Number(metavar), "share": Share(),
        "ratio": Ratio(), "rank": RankNumber(), "weights": WeightList(),
    }  # fmt: skip
    if option.words.form in forms:
        return forms[option.words.form]
    if option.choices:
        return OneOf(option.choices)
    if metavar in ("PROGRAM", "DIALECT"):
        return Named(_programs if metavar == "PROGRAM" else _dialects)
    if "Path" in str(option.type):
        return File()
    types = alternatives(option.type)
    return int if int in types and str not in types else None
