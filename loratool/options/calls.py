"""A function of one options object becomes one of flat keywords, with signature and docstring."""

import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from loratool.options.words import Option, Options, options_of

P = ParamSpec("P")
O = TypeVar("O")  # noqa: E741  the options
R = TypeVar("R")


def takes(kind: Callable[P, O]) -> Callable[[Callable[[O], R]], Callable[P, R]]:
    """Let a command be called with the fields of its options class as keywords.

    Args:
        kind: the class: its fields are the keywords, their words the docstring's arguments.

    Example:
        >>> from loratool.options.hub import Pull
        >>> @takes(Pull)
        ... def where(asked: Pull) -> str:
        ...     return f"{asked.repo} -> {asked.output}"
        >>> where("me/style", output="style")
        'me/style -> style'
    """

    def decorate(function: Callable[[O], R]) -> Callable[P, R]:
        signature = _signature(kind, function)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                signature.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(_explain(function.__name__, error, kwargs, signature)) from None
            return function(kind(*args, **kwargs))

        call.__signature__ = signature  # type: ignore[attr-defined]
        call.__doc__ = _with_arguments(inspect.getdoc(function) or "", kind)
        return call

    return decorate


def _signature(kind: Any, function: Callable[..., Any]) -> inspect.Signature:
    options = sorted(options_of(kind), key=lambda o: not o.is_positional)
    return inspect.Signature(
        list(map(_parameter, options)), return_annotation=function.__annotations__["return"]
    )


@functools.cache
def _parameter(option: Option) -> inspect.Parameter:
    named = inspect.Parameter.KEYWORD_ONLY
    how = inspect.Parameter.POSITIONAL_OR_KEYWORD if option.is_positional else named
    default = inspect.Parameter.empty if option.is_required else option.default
    return inspect.Parameter(option.name, how, default=default, annotation=option.type)


def _explain(
    name: str, error: TypeError, given: dict[str, Any], signature: inspect.Signature
) -> str:
    """The same with the function's name, and for an unknown keyword the nearest that there is."""
    unknown = next((k for k in given if k not in signature.parameters), None)
    if unknown is None:
        return f"{name}(): {error}"
    import difflib

    close = difflib.get_close_matches(unknown, signature.parameters, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{name}() has no option {unknown!r}{hint}"


def _with_arguments(doc: str, kind: type[Options] | Any) -> str:
    """A docstring with the section ``Args`` that the options make, after its prose."""
    lines = ["Args:", *map(_described, options_of(kind))]
    heads = [doc.find(f"\n{head}:\n") for head in ("Returns", "Raises", "Example")]
    at = min((place for place in heads if place >= 0), default=len(doc))
    return f"{doc[:at].rstrip()}\n\n" + "\n".join(lines) + f"\n\n{doc[at:].lstrip()}".rstrip()


@functools.cache
def _described(option: Option) -> str:
    """A keyword in a docstring."""
    text = option.words.help.removesuffix(" Repeatable.")
    if option.default is True:  # what is said is said of the flag, ``--no-provenance``
        text = f"False: {text[:1].lower()}{text[1:]}"
    return textwrap.fill(f"{option.name}: {text}", 96, initial_indent="    ",
                         subsequent_indent="        ")  # fmt: skip
