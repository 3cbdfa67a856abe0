"""For mkdocstrings: functions that take an options class are shown as they are called.

``@takes(Merge)`` gives a function of one object the keywords of that class, with signature and
docstring, when it is imported; mkdocstrings reads the source, where they are not.
"""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

import griffe


class Signatures(griffe.Extension):
    """Puts the live signature and docstring in."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Called for every function that was read."""
        if not any(str(d.value).startswith("takes(") for d in func.decorators):
            return
        live = getattr(import_module(func.parent.path), func.name)
        func.parameters = griffe.Parameters(*map(_parameter, _taken(live)))
        func.docstring = griffe.Docstring(inspect.getdoc(live) or "", parent=func)


def _taken(function: Any) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


def _parameter(one: inspect.Parameter) -> griffe.Parameter:
    default = None if one.default is one.empty else repr(one.default)
    kind = getattr(griffe.ParameterKind, one.kind.name.lower())
    return griffe.Parameter(one.name, annotation=_type(one.annotation), kind=kind, default=default)


def _type(annotation: Any) -> str | None:
    if annotation is inspect.Parameter.empty:
        return None
    if isinstance(annotation, type):
        return annotation.__name__
    return str(annotation).replace("typing.", "").replace("collections.abc.", "")
